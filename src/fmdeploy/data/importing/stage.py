"""`data import`: a DATASET from nuScenes tables, a folder of images, WebDataset shards or MCAP logs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fmdeploy.artifact import Artifact
from fmdeploy.command import command
from fmdeploy.config import InputPath, Internal, OutputPath, Positional
from fmdeploy.data.format import SPLITS
from fmdeploy.data.importing.drives import Drive, content_digest
from fmdeploy.data.importing.images import class_names, image_drives, read_table
from fmdeploy.data.importing.mcap import Rules, mcap_drives, parse_topics
from fmdeploy.data.importing.nuscenes import nuscenes_drives
from fmdeploy.data.importing.nuscenes_tables import TABLES, read_tables
from fmdeploy.data.importing.webdataset import shards_of, webdataset_drives
from fmdeploy.data.leakage import refuse_leaks
from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.data.split import SplitRules, divide
from fmdeploy.data.writer import DatasetWriter
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import DataError
from fmdeploy.manifest import Kind
from fmdeploy.progress import progress

Format = Literal["nuscenes", "images", "webdataset", "mcap"]
RECORDED = ("nuscenes", "mcap")  # formats whose drives are parts of recordings


class ImportConfig(SplitRules):
    """What to import, and how to divide it where the source does not say."""

    source: Annotated[InputPath, Positional()] = Field(description="Folder or file to import")
    out: OutputPath = Field(description="Folder of the DATASET")
    format: Format = Field(description="What the source is")
    by: str = Field(default="auto", min_length=1, description=(
        "What stays together: 'sequence', 'geography', or any key of the metadata, such as route, date, place; auto: "
        "the recording where the format names it"))
    labels: InputPath | None = Field(default=None, description="images: CSV or JSON table; none: a folder a class")
    height: int | None = Field(default=None, ge=1, le=8192, description="images are resized to this")
    width: int | None = Field(default=None, ge=1, le=8192, description="images are resized to this")
    channels: Literal[1, 3] = Field(default=3, description="of images: grey or RGB")
    topic: tuple[str, ...] = Field(default=(), description="mcap: NAME=/topic:field, such as speed=/odom:twist.x")
    rate_hz: float = Field(default=5.0, gt=0, le=1000, description="mcap: frames a second")
    max_age_s: float = Field(default=1.0, gt=0, description="mcap: oldest message that a frame may show")
    nuscenes_version: str | None = Field(default=None, description="nuscenes: folder of the tables, such as v1.0-mini")
    reference: str = Field(default="LIDAR_TOP", description="nuscenes: channel whose key frames give the ego's pose")
    points: bool = Field(default=True, description="nuscenes: read point clouds where they are")
    content: Annotated[str, Internal()] = Field(default="", description="sha256 of the source")

    @model_validator(mode="after")
    def _fits_the_format(self) -> ImportConfig:
        if (self.height is None) != (self.width is None):
            raise ValueError("give both height and width")
        if self.format == "mcap" and not self.topic:
            raise ValueError("an MCAP log needs at least one --topic NAME=/topic:field")
        if self.labels is not None and self.format != "images":
            raise ValueError("labels belong to a folder of images")
        return self

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) of images."""
        return None if self.height is None or self.width is None else (self.height, self.width)


@command(ImportConfig)
def import_data(config: ImportConfig) -> Artifact:
    """Import recordings of another format as a DATASET; splits of the source are kept, else --by divides.

    What a sequence's metadata says of route, date, place, map version and rig comes along, for audits and reports. The
    digest covers every byte that was read.

    Raises:
        DataError: the source is not what `format` says, or part of it cannot be read: nothing is written then.
        LeakageError: its own splits leak.
        MissingDependencyError: the format needs a package that is not installed.
    """
    parse_topics(config.topic)  # before every byte is read
    config = config.model_copy(update={"content": _digest(config)})
    return produce(config.out, Kind.DATASET, stage="data import", config=config, inputs={},
                   build=lambda draft: _build(draft, config))


def _digest(config: ImportConfig) -> str:
    if not config.source.exists():
        raise DataError("does not exist", where=config.source)
    root = config.source if config.source.is_dir() else config.source.parent
    return content_digest(root, _files(config))


def _files(config: ImportConfig) -> list[Path]:
    """Every file that the import reads."""
    source = config.source
    if config.format == "images":
        table = [] if config.labels is None or not config.labels.is_relative_to(source) else [config.labels]
        return [*table, *(source / str(row["file"]) for row in read_table(source, config.labels))]
    if config.format == "nuscenes":
        tables = read_tables(source, config.nuscenes_version)
        clouds = [source / found[config.reference]["filename"] for found in tables.key_frames.values()
                  if config.reference in found]
        named = [source / tables.version / f"{name}.json" for name in TABLES]
        return [*named, *(path for path in clouds if config.points and path.is_file())]
    if config.format == "webdataset":
        return shards_of(source)
    return _logs(source)


def _logs(source: Path) -> list[Path]:
    found = [source] if source.is_file() else sorted(source.glob("**/*.mcap"))
    if not found:
        raise DataError("holds no MCAP logs", where=source, expected="*.mcap")
    return found


def _drives(config: ImportConfig) -> Iterable[Drive]:
    if config.format == "images":
        rows = read_table(config.source, config.labels)
        return image_drives(config.source, rows, size=config.size, channels=config.channels)
    if config.format == "nuscenes":
        tables = read_tables(config.source, config.nuscenes_version)
        return nuscenes_drives(tables, reference=config.reference, points=config.points)
    if config.format == "webdataset":
        return webdataset_drives(shards_of(config.source), size=config.size, channels=config.channels)
    rules = Rules(parse_topics(config.topic), config.rate_hz, config.max_age_s, config.size,
                  config.channels)
    return _of_logs(config.source, rules)


def _of_logs(source: Path, rules: Rules) -> Iterator[Drive]:
    for path in _logs(source):
        name = path.stem if path == source else path.relative_to(source).with_suffix("").as_posix()
        yield from mcap_drives(path, rules, name)


def _build(draft: Draft, config: ImportConfig) -> None:
    said: dict[str, str | None] = {}
    with DatasetWriter(draft) as writer, progress("import") as bar:
        for drive in _drives(config):
            if drive.id in said:
                raise DataError(f"two recordings of it would be called {drive.id}", where=config.source,
                                fix="Rename one; the samples of one sequence must follow each other")
            writer.add(drive.id, drive.arrays, {"simulation": drive.id, **drive.metadata})
            said[drive.id] = drive.split
            bar.advance()
        sequences = [SequenceInfo(**record) for record in writer.index]
        splits = _splits(config, sequences, said)
        refuse_leaks(sequences, splits, config.source)
        writer.close(splits)
    if config.format == "images":
        draft.write_json("classes.json", class_names(read_table(config.source, config.labels)))


def _splits(config: ImportConfig, sequences: list[SequenceInfo], said: dict[str, str | None]) -> dict[str, list[str]]:
    """As the source says, if it says so of every sequence; else by the rules."""
    named = {name: split for name, split in said.items() if split is not None}
    if not named:
        by = config.by if config.by != "auto" else "recording" if config.format in RECORDED else "sequence"
        return divide(sequences, config.model_copy(update={"by": by}), config.source) if sequences else {}
    if len(named) < len(said):
        raise DataError("says of some sequences which split they are in, but not of all", where=config.source,
                        found=f"{len(named)} of {len(said)}", fix="Name a split for every one, or for none")
    return {split: [s.id for s in sequences if named[s.id] == split] for split in SPLITS}
