"""Leaks of every kind are planted and found; clean data passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fmdeploy.artifact import Artifact
from fmdeploy.command import Outcome
from fmdeploy.config import StageConfig
from fmdeploy.data.audit import audit
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.from_arrays import write_arrays
from fmdeploy.data.phash import CLIP_THRESHOLD, near_pairs, phash, signatures
from fmdeploy.data.record import record
from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ArtifactError, DataError, LeakageError
from fmdeploy.manifest import Kind
from fmdeploy.task import Arrays

Plant = Callable[..., Artifact]


def kinds(outcome: Outcome) -> set[str]:
    assert outcome.exit_code == (1 if outcome.data else 0)
    assert all(set(leak) == {"trap", "samples", "why"} and leak["samples"] and leak["why"] for leak in outcome.data)
    return {leak["trap"] for leak in outcome.data}


def busiest(data: Dataset) -> SequenceInfo:
    """The training sequence with the most occupied cells."""
    return max(data.split("train"), key=lambda s: int(np.unpackbits(data.arrays(s)["occupancy"]).sum()))


def test_clean_recording_passes(recording: Dataset) -> None:
    outcome = audit(data=str(recording.artifact.root))
    assert kinds(outcome) == set()
    assert outcome.data == []
    assert outcome.lines[0].startswith("no leakage found")
    assert "pHash of occupancy, two frames" in outcome.lines[0]


def test_shared_sequence_is_named(recording: Dataset, plant: Plant) -> None:
    victim = recording.splits["train"][0]
    splits = {**recording.splits, "test": [*recording.splits["test"], victim]}
    leaking = plant("shared", splits)
    outcome = audit(data=str(leaking.root), content=False)
    assert kinds(outcome) == {"shared sequence", "shared seed"}  # the seed with the other ego, which stays behind
    assert outcome.data[0]["samples"] == [victim, victim]
    assert victim in outcome.lines[0]
    with pytest.raises(DataError, match=f"{victim} is in both"):
        open_dataset(leaking.root)


def test_shared_seed_is_named(recording: Dataset, plant: Plant) -> None:
    """The two egos of one simulation in two splits."""
    one, other = recording.splits["train"][:2]
    splits = {**recording.splits, "train": [i for i in recording.splits["train"] if i != other],
              "test": [*recording.splits["test"], other]}
    outcome = audit(data=str(plant("seed", splits).root), content=False)
    assert kinds(outcome) == {"shared seed"}
    assert set(outcome.data[0]["samples"]) == {one, other}


def disguised(base: SequenceInfo) -> dict[str, object]:
    """Metadata under which a copy looks like another simulation."""
    return {"id": "copy-1", "seed": 10**6, "simulation": "copy-1", "recording": "copy-1", "route": "copy-1"}


@pytest.mark.parametrize("damage", ["none", "lost cells", "other sensors"])
def test_near_duplicates_are_found_under_another_name(recording: Dataset, plant: Plant, damage: str) -> None:
    base, rng = busiest(recording), np.random.default_rng(0)
    arrays: Arrays = dict(recording.arrays(base))
    if damage == "lost cells":
        kept = np.packbits(rng.random((40, 4096)) > 0.05, axis=1)
        arrays["occupancy"] = arrays["occupancy"] & kept
    if damage == "other sensors":
        for name in ("lidar_hit", "lidar_free", "camera_vehicle"):
            arrays[name] = arrays[name] & np.packbits(rng.random((40, 4096)) > 0.3, axis=1)
    leaking = plant(damage.replace(" ", "-"), extra=[("test", base, arrays, disguised(base))])
    outcome = audit(data=str(leaking.root))
    assert kinds(outcome) == {"near-duplicate frames"}
    assert [leak["samples"] for leak in outcome.data] == [[base.id, "copy-1"]]
    assert "of 510 bits" in outcome.data[0]["why"]


def test_neighbouring_parts_of_one_recording_are_found(recording: Dataset, plant: Plant) -> None:
    base = busiest(recording)
    later = {**disguised(base), "recording": base.id}
    quiet = {k: np.zeros_like(v) for k, v in recording.arrays(base).items()}
    touching = plant("touching", extra=[("val", base, quiet, {**later, "first_frame": 45})])
    outcome = audit(data=str(touching.root))
    assert kinds(outcome) == {"adjacent frames"}
    assert "frames 0..39 and 45..84" in outcome.data[0]["why"]
    apart = plant("apart", extra=[("val", base, quiet, {**later, "first_frame": 60})])
    assert kinds(audit(data=str(apart.root))) == set()


def test_misused_samples_are_found(recording: Dataset, tmp_path: Path) -> None:
    in_test, in_train = f"{recording.splits['test'][0]}/7", f"{recording.splits['train'][0]}/9"
    root = str(recording.artifact.root)
    files = {
        "calibration": {"samples": [in_train, in_test]},
        "evaluation": {"data": "x:test", "ids": [in_test, in_train]},
        "on training": {"data": "x:train", "ids": [in_train], "samples": []},
        "foreign": {"samples": ["elsewhere/3"]},
        "other": {"numbers": [1, 2]},
    }
    paths = {name: tmp_path / f"{name}.json" for name in files}
    for name, content in files.items():
        paths[name].write_text(json.dumps(content))
    used = audit(data=root, content=False, against=[str(paths["calibration"])])
    assert kinds(used) == {"calibration sample"}
    assert used.data[0]["samples"] == [in_test]
    judged = audit(data=root, content=False, against=[str(paths["evaluation"])])
    assert kinds(judged) == {"evaluation sample"}
    assert judged.data[0]["samples"] == [in_train]
    assert kinds(audit(data=root, content=False, against=[str(paths["on training"])])) == {"evaluation sample"}
    with pytest.raises(DataError, match="elsewhere/3"):
        audit(data=root, against=[str(paths["foreign"])])
    with pytest.raises(DataError, match="names no calibration or evaluation samples"):
        audit(data=root, against=[str(paths["other"])])


@pytest.mark.parametrize(("kind", "leaks"), [(Kind.TEACHER, set()), (Kind.STUDENT, set()), (Kind.QUANTIZED, set()),
                                             (Kind.CHECK, {"evaluation sample"}), (Kind.BUNDLE, {"evaluation sample"})])
def test_only_what_was_trained_may_score_itself_on_training_data(
    recording: Dataset, tmp_path: Path, kind: Kind, leaks: set[str]
) -> None:
    def build(draft: Draft) -> None:
        draft.write_json("evaluation.json", {"data": f"{recording.digest}:train",
                                             "ids": [f"{recording.splits['train'][0]}/9"]})
        draft.write_json("calibration.json", {"samples": [f"{recording.splits['train'][0]}/11"]})

    found = produce(tmp_path / "a", kind, stage="check", config=StageConfig(), inputs={}, build=build)
    assert kinds(audit(data=str(recording.artifact.root), content=False, against=[str(found.root)])) == leaks


def test_long_lists_are_cut_for_people_only(recording: Dataset, plant: Plant) -> None:
    splits = {**recording.splits, "test": [*recording.splits["test"], *recording.splits["train"]]}
    outcome = audit(data=str(plant("many", splits).root), content=False, limit=2)
    assert len(outcome.lines) == 4
    assert outcome.lines[2].startswith("... and ")
    assert len(outcome.data) >= len(recording.splits["train"])


def test_simulations_that_differ_are_far_from_the_threshold(recording: Dataset) -> None:
    """The margin that the threshold was chosen for: nothing within one and a half times of it."""
    found = signatures(recording)
    place = {s.id: name for name, ids in recording.splits.items() for s in recording.sequences if s.id in ids}
    train = np.array([place[recording.sequences[i].id] == "train" for i in found.sequence_S])
    wide = found.__class__(**{**found.__dict__, "threshold": CLIP_THRESHOLD * 3 // 2})
    assert not list(near_pairs(wide, np.flatnonzero(train), np.flatnonzero(~train)))


def test_phash_bits_are_half_ones_and_follow_the_picture() -> None:
    rng = np.random.default_rng(0)
    image = np.kron(rng.random((3, 16, 16)), np.ones((1, 4, 4)))
    bits = phash(image)
    assert bits.shape == (3, 255)
    assert (np.abs(bits.mean(axis=1) - 0.5) < 0.01).all()
    assert np.array_equal(phash(image * 3 + 1), bits)  # brightness and contrast do not matter
    assert (phash(image + 0.02 * rng.random(image.shape)) != bits).mean() < 0.05
    assert 0.3 < (bits[0] != bits[1]).mean() < 0.7


def test_plain_arrays_are_compared_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small, large = rng.random((8, 8, 8)).astype(np.float32), rng.random((8, 32, 48)).astype(np.float32)
    small[7], large[7] = small[0], large[0] + 0.001 * rng.random((32, 48)).astype(np.float32)
    splits = {"train": np.arange(5), "test": np.arange(5, 8)}
    for name, images, method in (("small", small, "equal content"), ("large", large, "pHash of images")):
        write_arrays(tmp_path / name, {"image": images}, splits, name=name)
        outcome = audit(data=str(tmp_path / name))
        assert method in outcome.lines[-1]
        assert [leak["samples"] for leak in outcome.data] == [["train-0", "test-7"]]


def test_images_of_one_colour_say_nothing_of_each_other(tmp_path: Path) -> None:
    """A sequence may hold nothing else, such as a covered camera."""
    image = np.zeros((8, 1, 16, 16), np.float32) + np.arange(8, dtype=np.float32)[:, None, None, None] / 8
    write_arrays(tmp_path / "data", {"image": image}, {"train": np.arange(4), "test": np.arange(4, 8)})
    found = audit(data=str(tmp_path / "data"))
    assert (found.exit_code, found.data) == (0, [])


def test_corrupt_datasets_are_refused(recording: Dataset, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(recording.artifact.root, copy)
    shard = copy / "shards" / "00000.tar"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(ArtifactError, match="00000.tar: was altered"):
        audit(data=str(copy))
    shard.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ArtifactError, match="another size"):
        audit(data=str(copy))


def test_leakage_error_is_a_failed_gate() -> None:
    assert LeakageError("x").exit_code == 1


def test_two_recordings_with_one_seed_are_equal_and_leak_into_each_other(tmp_path: Path, plant: Plant,
                                                                          recording: Dataset) -> None:
    """Recording the same seed in other weather gives other sensors and the same scenes."""
    record(out=str(tmp_path / "again"), simulations=1, seed=9, scenarios=["exit"], weathers=["fog"], val=0, test=0, workers=1)
    record(out=str(tmp_path / "clear"), simulations=1, seed=9, scenarios=["exit"], weathers=["clear"], val=0, test=0,
           workers=1)
    one, other = open_dataset(tmp_path / "again"), open_dataset(tmp_path / "clear")
    sequence = one.sequences[0]
    foggy, clear = one.arrays(sequence), other.arrays(other.sequences[0])
    assert np.array_equal(foggy["occupancy"], clear["occupancy"])
    assert not np.array_equal(foggy["lidar_hit"], clear["lidar_hit"])
    leaking = plant("weather", extra=[
        ("train", sequence, foggy, {"id": "foggy", "seed": 1, "simulation": "a", "recording": "a", "route": "a"}),
        ("test", sequence, clear, {"id": "sunny", "seed": 2, "simulation": "b", "recording": "b", "route": "b"})])
    outcome = audit(data=str(leaking.root))
    assert [leak["samples"] for leak in outcome.data] == [["foggy", "sunny"]]
