"""`data join`: everything is there once, each sequence in its split, and what would leak is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fmdeploy.data.format import open_dataset
from fmdeploy.data.join import join
from fmdeploy.data.record import record
from fmdeploy.errors import ConfigError, DataError, LeakageError
from support.training_data import write_scenes


def recorded(out: Path, seed: int, **options: object) -> Path:
    """Four tiny simulations."""
    record(out=out, simulations=4, egos=1, frames=12, seed=seed, scenarios=["merge"], val=0.25, test=0.25, workers=1,
           **options)
    return out


def test_joint_dataset_holds_both(tmp_path: Path) -> None:
    one, other = recorded(tmp_path / "one", 1), recorded(tmp_path / "other", 2, rig="bumper-1")
    both = open_dataset(join(data=[one, other], out=tmp_path / "both").root)
    parts = [open_dataset(one), open_dataset(other)]
    assert len(both.sequences) == 8
    for split in ("train", "val", "test"):
        assert both.splits[split] == parts[0].splits[split] + parts[1].splits[split]
    for part in parts:
        for sequence in part.sequences:
            twin = next(s for s in both.sequences if s.id == sequence.id)
            assert twin.metadata == sequence.metadata
            arrays = both.arrays(twin)
            assert all(np.array_equal(array, arrays[name]) for name, array in part.arrays(sequence).items())
    assert set(both.artifact.inputs) == {"data0", "data1"}
    assert join(data=[one, other], out=tmp_path / "again").digest == both.digest


def test_the_same_recording_twice_is_refused(tmp_path: Path) -> None:
    one = recorded(tmp_path / "one", 1)
    with pytest.raises(DataError, match="is also in"):
        join(data=[one, one], out=tmp_path / "both")
    with pytest.raises(ConfigError, match="at least 2"):
        join(data=[one], out=tmp_path / "both")


def test_a_seed_in_two_splits_is_refused(tmp_path: Path) -> None:
    one = recorded(tmp_path / "one", 0)
    write_scenes(tmp_path / "other", sequences=16)  # the seeds 0 to 5 train, those of `one` are 0 to 3
    with pytest.raises(LeakageError, match="shared seed"):
        join(data=[one, tmp_path / "other"], out=tmp_path / "both")
