"""Inputs and outputs unlike the calibration set's (T17, T18): warnings, and a score that rises with the disturbance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.draft import Draft
from fmdeploy.errors import FrameError
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.runtime import GuardConfig, Reason, Runtime
from fmdeploy.runtime.bundle import OutputStatistics
from fmdeploy.runtime.guards.unusual import UnusualGuard
from support.bundles import make_bundle
from support.fdti import Fdti
from support.guards import PERIOD_MS, guards_of, pictures
from support.runtimes import frame, runtime

Picture = np.ndarray[Any, Any]
IMAGES = IOSpec(
    inputs=(TensorSpec(name="image", shape=(3, 32, 32), layout="CHW", value_range=(0, 1)),),
    outputs=(TensorSpec(name="y", shape=(1,)),), preprocessing="none")


def night(x: Picture, strength: float) -> Picture:
    return x * (1 - strength)


def fog(x: Picture, strength: float) -> Picture:
    return x * (1 - strength) + 0.8 * strength


def noise(x: Picture, strength: float) -> Picture:
    return np.clip(x + np.random.default_rng(1).normal(0, strength, x.shape), 0, 1)


def salt_and_pepper(x: Picture, strength: float) -> Picture:
    rng = np.random.default_rng(2)
    return np.where(rng.random(x.shape) < strength, rng.integers(0, 2, x.shape), x)


def occlusion(x: Picture, strength: float) -> Picture:
    y = x.copy()
    y[:, : round(strength * x.shape[1])] = 0
    return y


def blur(x: Picture, strength: float) -> Picture:
    """Mean over a window of 2 n + 1 cells, with wrapped edges: the mean of the picture stays exactly."""
    n = int(strength)
    y = sum(np.roll(x, (i, j), (1, 2)) for i in range(-n, n + 1) for j in range(-n, n + 1))
    return np.asarray(y) / (2 * n + 1) ** 2


def blocks(x: Picture, strength: float) -> Picture:
    """What a codec at its worst does, without a codec: blocks of 8 × 8 keep a share of their detail."""
    mean = x.reshape(3, 4, 8, 4, 8).mean(axis=(2, 4), keepdims=True)
    whole = np.broadcast_to(mean, (3, 4, 8, 4, 8)).reshape(x.shape)
    return np.asarray(whole + (1 - strength) * (x - whole))


LADDERS: dict[str, tuple[Callable[[Picture, float], Picture], tuple[float, ...]]] = {
    "night": (night, (0.1, 0.3, 0.5, 0.8)),
    "fog": (fog, (0.2, 0.4, 0.6, 0.9)),
    "noise": (noise, (0.1, 0.2, 0.4, 0.8)),
    "salt and pepper": (salt_and_pepper, (0.1, 0.25, 0.5, 0.9)),
    "occlusion": (occlusion, (0.25, 0.5, 0.75)),
    "blur": (blur, (1, 2, 4, 6)),
    "8x8 blocks": (blocks, (0.25, 0.5, 0.75, 1.0)),
}


def distance(guards: Any, picture: Picture) -> tuple[float, list[Reason]]:
    """Score and reasons of one picture."""
    found = guards.before({"image": np.ascontiguousarray(picture, np.float32)})
    return found.scores["image.distance"], [finding.code for finding in found.findings]


@pytest.mark.parametrize("name", LADDERS)
def test_T17_score_rises_with_the_disturbance(name: str, fdti: Fdti) -> None:
    disturb, ladder = LADDERS[name]
    guards = guards_of(IMAGES, {"image": pictures(128)})
    fresh = pictures(16, seed=1)
    rungs = []
    for strength in (None, *ladder):
        seen = [distance(guards, x if strength is None else disturb(x, strength)) for x in fresh]
        rungs.append(float(np.mean([score for score, _ in seen])))
    print(name, [round(rung, 2) for rung in rungs])
    assert rungs == sorted(rungs), rungs
    assert rungs[-1] > 2 * rungs[0]
    with fdti.detecting(name):
        score, codes = distance(guards, disturb(fresh[0], ladder[-1]))
    assert score > rungs[0]
    limits = GuardConfig()
    assert (Reason.OUT_OF_DISTRIBUTION in codes) == (score > limits.refuse_sigma)
    assert bool(codes) == (score > limits.unusual_sigma)
    assert set(codes) <= {Reason.UNUSUAL_INPUT, Reason.OUT_OF_DISTRIBUTION}


def test_T17_one_look_a_frame_is_enough_for_a_whole_picture(fdti: Fdti) -> None:
    """In a stream the statistics are taken in turn; what befalls a whole picture is seen within a round of the inputs."""
    guards = guards_of(IMAGES, {"image": pictures(128)}, GuardConfig())
    stream = pictures(24, seed=1)
    for picture in stream[:16]:
        assert distance(guards, picture)[1] == []
    late = next(n for n, picture in enumerate(stream[16:]) if distance(guards, night(picture, 0.8))[1])
    fdti.report(late * PERIOD_MS, f"night after {late} frames at 10 Hz")
    assert late <= 1
    assert isinstance(guards.unusual, UnusualGuard)
    assert guards.unusual.num_looks == 6  # three means and an energy beside each


def test_T17_a_warning_ends_with_its_cause() -> None:
    guards = guards_of(IMAGES, {"image": pictures(128)}, GuardConfig())
    stream = pictures(40, seed=1)
    assert distance(guards, night(stream[0], 0.9))[1]
    codes = [distance(guards, picture)[1] for picture in stream[1:]]
    assert codes[-1] == []
    assert all(found == [] for found in codes[6:]), "after one round at the latest"


def test_T17_unusual_input_is_a_warning() -> None:
    odd = frame()
    odd["lidar"][:] = np.minimum(odd["lidar"] + 0.6 * (np.arange(16) % 2), 1)
    found = runtime().infer(odd)
    assert found.reasons == (Reason.UNUSUAL_INPUT,)
    assert found.valid
    assert 8 < found.scores["lidar.distance"] < 12


def test_T17_far_from_calibration_is_refused(fdti: Fdti) -> None:
    """A stream: refused within two frames, in every frame while it lasts, and not in the first one after it."""
    def noisy(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        return {name: np.maximum(x, rng.uniform(0.6, 1, x.shape)).astype(np.float32) for name, x in frame(seed).items()}

    target = runtime()
    assert all(target.infer(frame(seed)).valid for seed in range(20))
    found = [target.infer(noisy(seed)) for seed in range(20, 60)]
    first = next(number for number, each in enumerate(found) if not each.valid)
    fdti.report(first * PERIOD_MS, f"noise over all inputs, refused after {first} frames at 10 Hz")
    assert first <= 1
    for each in found[first:]:
        assert not each.valid
        assert Reason.OUT_OF_DISTRIBUTION in each.reasons
    assert "sigmas off, at most 12 are allowed" in found[-1].findings[0].detail
    assert target.infer(frame(60)).valid


def test_T17_control_refusing_can_be_switched_off() -> None:
    odd = frame()
    odd["lidar"][:] = np.minimum(odd["lidar"] + (np.arange(16) % 2), 1)
    assert runtime().infer(odd).reasons == (Reason.OUT_OF_DISTRIBUTION,)
    found = runtime(guards=GuardConfig(refuse_sigma=0)).infer(odd)
    assert (found.valid, found.reasons) == (True, (Reason.UNUSUAL_INPUT,))


def test_T17_output_outside_its_band(fdti: Fdti) -> None:
    band = OutputStatistics(rms_mean=1e-4, rms_std=1e-6, rms_min=1e-4, rms_max=1.1e-4)
    guards = guards_of(outputs={"bev": band})
    outputs = runtime().infer(frame()).outputs
    with fdti.detecting("output"):
        found = guards.outputs(outputs)
    assert [finding.code for finding in found] == [Reason.UNUSUAL_OUTPUT]
    assert "calibration gave 0.0001..0.00011" in found[0].detail
    broken = {name: array.copy() for name, array in outputs.items()}
    broken["bev"][0, 0, 0] = np.nan
    broken["scene"][0] = np.inf
    assert [finding.code for finding in guards.outputs(broken)] == [Reason.NOT_FINITE_OUTPUT] * 2


def test_T17_control_clean_frames_raise_no_alarm() -> None:
    guards = guards_of(IMAGES, {"image": pictures(256)})
    alarms = sum(bool(distance(guards, picture)[1]) for picture in pictures(500, seed=1))
    print(f"false alarms: {alarms} of 500")
    assert alarms == 0
    rms = [float(np.sqrt(np.mean(np.square(runtime().infer(frame(seed)).outputs["bev"])))) for seed in range(8)]
    band = OutputStatistics(rms_mean=float(np.mean(rms)), rms_std=float(np.std(rms)), rms_min=min(rms), rms_max=max(rms))
    target = guards_of(outputs={"bev": band})
    assert [target.outputs(runtime().infer(frame(seed)).outputs) for seed in range(50, 60)] == [[]] * 10


def test_T18_metadata_of_adversarial_size(fdti: Fdti) -> None:
    """A hundred thousand layouts or missing sensors are refused, not walked through, and the text of the error stays short."""
    target = runtime()
    many = {f"x{number}": "CHW" for number in range(10**5)}
    for options in ({"layouts": many}, {"missing": many}, {"inputs": many}):
        with pytest.raises(FrameError) as caught, fdti.raising(next(iter(options))):
            target.infer(**{"inputs": frame(), **options})  # type: ignore[arg-type]
        assert len(str(caught.value)) < 2000
    assert target.infer(frame()).valid


def test_T18_control_metadata_of_usual_size() -> None:
    assert runtime().infer(frame(), layouts={"lidar": "CHW", "camera": "CHW"}).valid


def test_bundle_gives_its_output_statistics_to_the_guards(tmp_path: Path) -> None:
    def change(draft: Draft) -> None:
        path = draft.path("input_statistics.json")
        known = json.loads(path.read_text())
        path.unlink()
        band = {"rms_mean": 1e-4, "rms_std": 1e-6, "rms_min": 1e-4, "rms_max": 1e-4}
        draft.write_json("input_statistics.json", {**known, "outputs": {"bev": band}})

    found = Runtime(make_bundle(tmp_path / "bundle", change=change).root, tiers=("fp32",)).infer(frame())
    assert found.reasons == (Reason.UNUSUAL_OUTPUT,)
    assert found.valid
    assert found.outputs, "a warning keeps the outputs"
