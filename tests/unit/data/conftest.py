"""One small recording for all tests of this folder, and a way to plant leaks in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from fmdeploy.artifact import Artifact
from fmdeploy.config import OutputPath, StageConfig
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.record import record
from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.data.writer import DatasetWriter
from fmdeploy.draft import Draft, produce
from fmdeploy.manifest import Kind
from fmdeploy.task import Arrays

Splits = Mapping[str, Sequence[str]]
Plant = Callable[..., Artifact]


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two simulations of every scenario, two egos each, in all weathers."""
    out = tmp_path_factory.mktemp("recording") / "data"
    record(out=str(out), simulations=16, seed=7, workers=1)
    return open_dataset(out)


class PlantConfig(StageConfig):
    """A dataset that was tampered with on purpose."""

    out: OutputPath
    name: str


@pytest.fixture
def plant(recording: Dataset, tmp_path: Path) -> Plant:
    """Write the recording again with other splits, and perhaps more sequences, without the checks of the writer."""

    def write(
        name: str, splits: Splits | None = None,
        extra: Sequence[tuple[str, SequenceInfo, Arrays, dict[str, object]]] = (),
        edit: Callable[[SequenceInfo], Mapping[str, object]] = lambda sequence: {},
    ) -> Artifact:
        def build(draft: Draft) -> None:
            writer = DatasetWriter(draft)
            for sequence in recording.sequences:
                writer.add(sequence.id, recording.arrays(sequence), {**sequence.metadata, **edit(sequence)})
            chosen = {key: list(ids) for key, ids in (splits or recording.splits).items()}
            for split, base, arrays, changes in extra:
                metadata = {**base.metadata, **changes}
                writer.add(str(metadata["id"]), arrays, {k: v for k, v in metadata.items() if k != "id"})
                chosen[split].append(str(metadata["id"]))
            writer.close({})
            draft.write_json("splits.json", chosen)

        out = tmp_path / name
        return produce(out, Kind.DATASET, stage="test", config=PlantConfig(out=out, name=name), inputs={}, build=build)

    return write
