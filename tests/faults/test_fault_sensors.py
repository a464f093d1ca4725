"""Sensors that are not there, or are not the ones the model was made for (F17, T16)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fmdeploy.budgets import SensorLoss
from fmdeploy.draft import Draft
from fmdeploy.errors import ArtifactError, FrameError
from fmdeploy.runtime import Reason, Runtime, open_bundle
from support.bundles import Arrays, budgets, io_spec, make_bundle, run_model
from support.fdti import Fdti
from support.guards import guards_of
from support.runtimes import frame, runtime

LIMITS = budgets().model_copy(update={"sensor_loss": {"camera": SensorLoss(fill="zeros", max_drop=0.5)}})
LEFT, RIGHT = "1" * 64, "2" * 64


def without(name: str, seed: int = 0) -> Arrays:
    """A frame that lacks an input."""
    return {key: array for key, array in frame(seed).items() if key != name}


@pytest.fixture(scope="module")
def declared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that may run without its camera."""
    return make_bundle(tmp_path_factory.mktemp("loss") / "bundle", limits=LIMITS).root


def test_F17_missing_sensor_without_a_declared_mode(fdti: Fdti) -> None:
    target = runtime()
    with fdti.detecting():
        found = target.infer(without("camera"), missing=("camera",))
    assert found.reasons == (Reason.SENSOR_MISSING,)
    assert not found.valid
    assert found.outputs == {}
    assert "declares no mode" in found.findings[0].detail


def test_F17_missing_sensor_in_its_declared_mode(declared: Path, fdti: Fdti) -> None:
    target = Runtime(declared, tiers=("fp32",))
    with fdti.detecting("declared mode"):
        found = target.infer(without("camera"), missing=("camera",))
    assert found.reasons == (Reason.SENSOR_MODE,)
    assert found.valid
    assert found.mode == "D2"
    assert "filled with zeros" in found.findings[0].detail
    zeros = {**frame(), "camera": np.zeros((12, 16, 16), np.float32)}
    model = open_bundle(declared).model_bytes("fp32")
    expected = run_model(model, {name: array[None] for name, array in zeros.items()})["bev"][0]
    assert np.allclose(found.outputs["bev"], expected, atol=1e-5)
    assert "camera.distance" not in found.scores or found.scores["camera.distance"] == 0


def test_F17_the_other_sensor_and_both(declared: Path) -> None:
    target = Runtime(declared, tiers=("fp32",))
    assert target.infer(without("lidar"), missing=("lidar",)).reasons == (Reason.SENSOR_MISSING,)
    found = target.infer({}, missing=("camera", "lidar"))
    assert found.reasons == (Reason.SENSOR_MISSING,)
    assert "more than one" in found.findings[0].detail
    bad = without("camera")
    bad["lidar"][0, 0, 0] = np.nan
    found = target.infer(bad, missing=("camera",))
    assert found.reasons == (Reason.NOT_FINITE, Reason.SENSOR_MODE)
    assert found.outputs == {}, "what is there is guarded as ever"


def test_F17_nothing_is_filled_in_silence(declared: Path) -> None:
    """Left out without a word, named although it is there, or unknown: the caller's mistake."""
    target = Runtime(declared, tiers=("fp32",))
    for inputs, missing, message in (
        (without("camera"), (), "exactly the inputs of io.json"),
        (frame(), ("camera",), "that are not missing"),
        (frame(), ("radar",), "a missing input is not one of io.json"),
    ):
        with pytest.raises(FrameError, match=message):
            target.infer(inputs, missing=missing)


def test_F17_fill_with_the_calibration_mean() -> None:
    guards = guards_of(losses={"camera": SensorLoss(fill="calibration-mean", max_drop=0.5)})
    feeds = guards.before(without("camera"), ("camera",)).feeds
    assert feeds is not None
    assert list(feeds) == ["lidar", "camera"], "in the order of io.json"
    assert feeds["camera"].shape == (1, 12, 16, 16)
    assert np.ptp(feeds["camera"], axis=(2, 3)).max() == 0
    assert feeds["camera"].mean() == pytest.approx(0.3, abs=0.01)


def test_F17_mode_for_an_input_that_does_not_exist(tmp_path: Path) -> None:
    limits = budgets().model_copy(update={"sensor_loss": {"radar": SensorLoss(fill="zeros", max_drop=0.5)}})
    bundle = make_bundle(tmp_path / "bundle", limits=limits).root
    with pytest.raises(ArtifactError, match="loss of an input that io.json lacks"):
        Runtime(bundle, tiers=("fp32",))


def test_F17_control_all_sensors(declared: Path) -> None:
    target = Runtime(declared, tiers=("fp32",))
    assert [target.infer(frame(seed)).reasons for seed in range(20)] == [()] * 20
    target.infer(without("camera", 20), missing=("camera",))
    assert target.infer(frame(21)).reasons == (), "the camera is back"


@pytest.fixture(scope="module")
def rigged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for one rig."""
    def change(draft: Draft) -> None:
        spec = io_spec().model_copy(update={"rig": {"left": LEFT, "right": RIGHT}})
        draft.path("io.json").unlink()
        draft.write_json("io.json", spec.model_dump(mode="json"))

    return make_bundle(tmp_path_factory.mktemp("rig") / "bundle", change=change).root


@pytest.mark.parametrize(("rig", "message"), [
    ({"left": RIGHT, "right": LEFT}, "calibration is that of 'right', are the two swapped"),
    ({"left": LEFT, "right": "3" * 64}, "sensor 'right' is not the one that the model was made for"),
    ({"left": LEFT}, "found no such sensor"),
])
def test_T16_another_rig(rigged: Path, rig: dict[str, str], message: str, fdti: Fdti) -> None:
    with pytest.raises(ArtifactError, match=message), fdti.raising():
        Runtime(rigged, tiers=("fp32",), rig=rig)


def test_T16_control_the_right_rig_and_a_bundle_for_any(rigged: Path) -> None:
    assert Runtime(rigged, tiers=("fp32",), rig={"left": LEFT, "right": RIGHT, "rear": "4" * 64}).infer(frame()).valid
    assert Runtime(make_bundle(rigged.parent / "any").root, tiers=("fp32",), rig={"left": LEFT}).infer(frame()).valid


def test_T16_an_empty_rig_leaves_the_digest_alone() -> None:
    spec = io_spec()
    assert "rig" not in spec.model_dump(mode="json")
    assert spec.model_copy(update={"rig": {"left": LEFT}}).digest != spec.digest
    with pytest.raises(ValueError, match="does not name a sha256"):
        type(spec).model_validate({**spec.model_dump(), "rig": {"left": "abc"}})
