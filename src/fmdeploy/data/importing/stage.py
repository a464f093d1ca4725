"""`data import`: a DATASET from nuScenes tables, a folder of images, WebDataset shards or MCAP logs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fmdeploy.artifact import Artifact
from fmdeploy.command import command
from fmdeploy.config import InputPath, Internal, OutputPath, Positional
from fmdeploy.data.format import SPLITS
from fmdeploy.data.importing.drives import Drive, content_digest
from fmdeploy.data.importing.images import UNKNOWN, class_names, image_drives, is_labelled, read_table
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
from fmdeploy.progress import progress, say

Format = Literal["nuscenes", "images", "webdataset", "mcap"]
RECORDED = ("nuscenes", "mcap")  # formats whose drives are parts of recordings
OPTIONS_OF = {
    "images": ("labels",), "mcap": ("topic", "rate_hz", "max_age_s", "drive_s", "cloud_points"),
    "nuscenes": ("nuscenes_version", "reference", "points"),
}


class ImportConfig(SplitRules):
    """What to import, and how to divide it where the source does not say."""

    source: Annotated[InputPath, Positional()] = Field(description="Folder or file to import")
    out: OutputPath = Field(description="Folder of the DATASET")
    format: Format = Field(description="What the source is")
    by: str = Field(default="auto", min_length=1, description=(
        "What stays together: 'sequence', 'geography', or any key of the metadata, such as route, date, place; auto: "
        "the recording where the format names it"))
    labels: InputPath | None = Field(default=None, description="images: CSV or JSON table; none: a folder a class")
    height: int | None = Field(default=None, ge=1, le=8192, description="rows that images are resized to")
    width: int | None = Field(default=None, ge=1, le=8192, description="columns that images are resized to")
    channels: Literal[1, 3] = Field(default=3, description="of images: grey or RGB")
    topic: tuple[str, ...] = Field(default=(), description=(
        "mcap: NAME=/topic:field, such as speed=/odom:twist.x, or NAME=/topic for images and point clouds"))
    rate_hz: float = Field(default=5.0, gt=0, le=1000, description="mcap: frames a second")
    max_age_s: float = Field(default=1.0, gt=0, description="mcap: oldest message that a frame may show")
    drive_s: float = Field(default=60.0, gt=0, description="mcap: longest drive; longer ones are cut")
    cloud_points: int | None = Field(default=None, ge=1, description=(
        "mcap: points kept of a cloud; none: as many as the fullest of its drive has"))
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
        for owner, names in OPTIONS_OF.items():
            given = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
            if given and owner != self.format:
                raise ValueError(f"{given[0]} is an option of --format {owner}, and this is {self.format}")
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
    source = _source(config)
    root = config.source if config.source.is_dir() else config.source.parent
    config = config.model_copy(update={"content": source.digest(root)})
    return produce(config.out, Kind.DATASET, stage="data import", config=config, inputs={},
                   build=lambda draft: _build(draft, config, source))


@dataclass(frozen=True)
class Source:
    """What is imported, its tables parsed once: for the digest and for the drives alike.

    Attributes:
        files: Every file that the import reads.
        drives: Reads the recordings.
        beside: Files of the import that lie outside of what is imported.
        classes: Names of the labels, where the format has them.
    """

    files: list[Path]
    drives: Callable[[], Iterable[Drive]]
    beside: tuple[Path, ...] = ()
    classes: list[str] | None = None

    def digest(self, root: Path) -> str:
        """sha256 of every byte that is read."""
        parts = [content_digest(root, self.files), *(content_digest(path.parent, [path]) for path in self.beside)]
        return parts[0] if len(parts) == 1 else sha256("\n".join(parts).encode()).hexdigest()


def _source(config: ImportConfig) -> Source:
    if not config.source.exists():
        raise DataError("does not exist", where=config.source)
    return READERS[config.format](config)


def _images(config: ImportConfig) -> Source:
    root, table = config.source, config.labels
    rows = read_table(root, table)
    inside = table is not None and table.is_relative_to(root)
    if bare := sum(not is_labelled(row) for row in rows):
        say(f"{table}: {bare} of {len(rows)} images have no label"
            + ("" if bare == len(rows) else f"; theirs is {UNKNOWN}, which losses and metrics leave out"))
    return Source(
        [*([table] if table is not None and inside else []), *(root / str(row["file"]) for row in rows)],
        lambda: image_drives(root, rows, size=config.size, channels=config.channels),
        beside=() if table is None or inside else (table.resolve(),),
        classes=class_names(rows) or None)


def _nuscenes(config: ImportConfig) -> Source:
    tables = read_tables(config.source, config.nuscenes_version)
    clouds = [config.source / found[config.reference]["filename"] for found in tables.key_frames.values()
              if config.reference in found]
    named = [config.source / tables.version / f"{name}.json" for name in TABLES]
    return Source([*named, *(path for path in clouds if config.points and path.is_file())],
                  lambda: nuscenes_drives(tables, reference=config.reference, points=config.points))


def _webdataset(config: ImportConfig) -> Source:
    shards = shards_of(config.source)
    return Source(shards, lambda: webdataset_drives(shards, size=config.size, channels=config.channels))


def _mcap(config: ImportConfig) -> Source:
    logs = [config.source] if config.source.is_file() else sorted(config.source.glob("**/*.mcap"))
    if not logs:
        raise DataError("holds no MCAP logs", where=config.source, expected="*.mcap")
    rules = Rules(parse_topics(config.topic), config.rate_hz, config.max_age_s, config.size, config.channels,
                  config.cloud_points, config.drive_s)
    return Source(logs, lambda: _of_logs(config.source, logs, rules))


READERS: dict[Format, Callable[[ImportConfig], Source]] = {
    "images": _images, "nuscenes": _nuscenes, "webdataset": _webdataset, "mcap": _mcap,
}


def _of_logs(source: Path, logs: Sequence[Path], rules: Rules) -> Iterator[Drive]:
    for path in logs:
        name = path.stem if path == source else path.relative_to(source).with_suffix("").as_posix()
        yield from mcap_drives(path, rules, name)


def _build(draft: Draft, config: ImportConfig, source: Source) -> None:
    said: dict[str, str | None] = {}
    with DatasetWriter(draft) as writer, progress("import") as bar:
        for drive in source.drives():
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
    if source.classes is not None:
        draft.write_json("classes.json", source.classes)


def _splits(config: ImportConfig, sequences: list[SequenceInfo], said: dict[str, str | None]) -> dict[str, list[str]]:
    """As the source says, if it says so of every sequence; else by the rules."""
    named = {name: split for name, split in said.items() if split is not None}
    if not named:
        by = config.by if config.by != "auto" else "recording" if config.format in RECORDED else "sequence"
        return divide(sequences, config.model_copy(update={"by": by}), config.source) if sequences else {}
    if len(named) < len(said):
        raise DataError("says of some sequences which split they are in, but not of all", where=config.source,
                        found=f"{len(named)} of {len(said)}", fix="Name a split for every one, or for none")
    found = {split: [s.id for s in sequences if named[s.id] == split] for split in SPLITS}
    if empty := [split for split, ids in found.items() if not ids]:
        # A set to evaluate on is worth importing, so it is no error; stages that want that split refuse it.
        say(f"{config.source}: its own splits leave {' and '.join(empty)} empty"
            + (": nothing can be trained on it" if "train" in empty else "")
            + "; fmdeploy data split divides it anew")
    return found
