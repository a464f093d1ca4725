"""`data split`: the same sequences, divided anew into train, val and test.

The units that are dealt out are never torn: seeds (with everything that shares a seed, a simulation or a recording),
or all sequences with one date, place or map version, for a hold-out. Shards are hard links where the file system
allows it, so a new split costs no space.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from pydantic import Field, model_validator

from fmdeploy.artifact import Artifact
from fmdeploy.command import command
from fmdeploy.config import InputPath, OutputPath, StageConfig
from fmdeploy.data.format import SPLITS, Dataset, open_unchecked
from fmdeploy.data.leakage import refuse_leaks
from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.data.writer import write_index
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import DataError
from fmdeploy.manifest import Kind

METRES_PER_DEGREE = 111_320.0  # of latitude, and of longitude at the equator


class SplitRules(StageConfig):
    """How sequences are divided."""

    by: str = Field(default="seed", min_length=1, description=(
        "What stays together: 'seed', 'sequence', 'geography' (tiles of 'position'), or any key of the metadata, such "
        "as route, scenario, place, date, map_version"))
    tile_m: float = Field(default=500.0, gt=0, description="Side of a tile in metres, for 'geography'")
    chronological: bool = Field(default=False, description=(
        "Deal units in their sorted order instead of at random: the last dates are test, those before them val"))
    val: float = Field(default=0.2, ge=0, lt=1, description="Share for validation, of the units in 'by'")
    test: float = Field(default=0.2, ge=0, lt=1, description="Share for test")
    val_values: tuple[str, ...] = Field(default=(), description="Hold out these values of 'by' for validation")
    test_values: tuple[str, ...] = Field(default=(), description="Hold out these values of 'by' for test")
    seed: int = Field(default=0, ge=0, description="Which of the possible splits")

    @model_validator(mode="after")
    def _agree(self) -> SplitRules:
        if self.val + self.test >= 1:
            raise ValueError(f"val + test must leave something to train on, found {self.val} + {self.test}")
        if twice := sorted(set(self.val_values) & set(self.test_values)):
            raise ValueError(f"{twice[0]!r} is held out for both val and test")
        return self


class SplitConfig(SplitRules):
    """How to split."""

    data: InputPath = Field(description="The DATASET to split anew")
    out: OutputPath = Field(description="Folder of the new DATASET")


@command(SplitConfig)
def split(config: SplitConfig) -> Artifact:
    """Divide a dataset anew: by seed, sequence, route, date, geography, map version, or by values to hold out.

    Raises:
        DataError: the metadata lacks the key or the value, or a split would be empty.
        LeakageError: the split would leak: sequences of one seed, simulation or recording in two splits.
    """
    data = open_unchecked(config.data)
    chosen = divide(data.sequences, config, config.data)
    refuse_leaks(data.sequences, chosen, config.data)
    return produce(config.out, Kind.DATASET, stage="data split", config=config, inputs={"data": data.artifact},
                   build=lambda draft: _build(draft, data, chosen))


def divide(sequences: Sequence[SequenceInfo], config: SplitRules, where: object) -> dict[str, list[str]]:
    """Split name → sequence ids in index order, as the configuration asks; whether it leaks is another question.

    Raises:
        DataError: the metadata lacks the key or the value, or a split would be empty.
    """
    value_of = {sequence.id: _value(sequence, config) for sequence in sequences}
    if absent := sorted({*config.val_values, *config.test_values} - set(value_of.values())):
        known = sorted(set(value_of.values()))
        raise DataError(f"no sequence has {config.by} {absent[0]!r}", where=where,
                        found=", ".join(known[:12]) + (", ..." if len(known) > 12 else ""))
    if config.val_values or config.test_values:
        held = {**dict.fromkeys(config.val_values, "val"), **dict.fromkeys(config.test_values, "test")}
        place = {sequence: held.get(value, "train") for sequence, value in value_of.items()}
    else:
        place = _deal(sequences, value_of, config)
    chosen = {name: [s.id for s in sequences if place[s.id] == name] for name in SPLITS}
    wanted = {"train"} | {name for name, share in (("val", config.val), ("test", config.test)) if share > 0}
    if config.val_values or config.test_values:
        wanted = {"train", *held.values()}
    if empty := [name for name in SPLITS if name in wanted and not chosen[name]]:
        raise DataError(f"the split {empty[0]!r} would be empty", where=where,
                        found=f"{len(set(value_of.values()))} values of {config.by}",
                        fix="Divide by a key with more values, or make its share 0")
    return chosen


def _value(sequence: SequenceInfo, config: SplitRules) -> str:
    key = config.by
    if key == "sequence":
        return sequence.id
    if key == "geography" and key not in sequence.metadata:
        return tile_of(sequence, config.tile_m)
    if key == "seed" and "seed" not in sequence.metadata:
        return sequence.group
    if key not in sequence.metadata:
        raise DataError(f"sequence {sequence.id} has no {key!r} in its metadata", where="by",
                        found=", ".join(sorted(sequence.metadata)) or "none")
    return str(sequence.metadata[key])


def tile_of(sequence: SequenceInfo, side_m: float) -> str:
    """Name of the square tile that a sequence lies in.

    Raises:
        DataError: its metadata says no position.
    """
    latitude, longitude = position_of(sequence)
    row = math.floor(latitude * METRES_PER_DEGREE / side_m)
    parallel = math.cos(math.radians((row + 0.5) * side_m / METRES_PER_DEGREE))  # of the row: one for all its tiles
    return f"{row}:{math.floor(longitude * METRES_PER_DEGREE * parallel / side_m)}"


def position_of(sequence: SequenceInfo) -> tuple[float, float]:
    """Latitude and longitude in degrees, as numbers or as the text of a table's cell.

    They are `position`, [latitude, longitude] or "latitude longitude", or two keys of these names.

    Raises:
        DataError: the metadata has neither, or what it has is no place on Earth.
    """
    said = sequence.metadata.get("position")
    if said is None and {"latitude", "longitude"} <= sequence.metadata.keys():
        said = [sequence.metadata["latitude"], sequence.metadata["longitude"]]
    parts = said.replace(",", " ").split() if isinstance(said, str) else said
    try:
        latitude, longitude = map(float, parts if isinstance(parts, (list, tuple)) else [])
    except (TypeError, ValueError):
        latitude = longitude = math.nan
    if not (abs(latitude) <= 90 and math.isfinite(longitude)):
        raise DataError(f"sequence {sequence.id} has no 'position'", where="by geography", found=repr(said)[:40],
                        expected="[latitude, longitude] in degrees, two keys of these names, or a key 'geography'")
    return latitude, longitude


def _deal(sequences: Sequence[SequenceInfo], value_of: dict[str, str], config: SplitRules) -> dict[str, str]:
    """Deal the units out at random, scenario after scenario, each to the split that is most behind its share."""
    units: dict[str, list[SequenceInfo]] = defaultdict(list)
    for sequence in sequences:
        units[value_of[sequence.id]].append(sequence)
    names = sorted(units)
    if config.chronological:
        return _in_order(names, units, config)
    order = [names[i] for i in np.random.default_rng(config.seed).permutation(len(names))]
    order.sort(key=lambda name: str(units[name][0].metadata.get("scenario", "")))
    wanted = np.array([1 - config.val - config.test, config.val, config.test])
    given, total, place = np.zeros(3), 0, {}
    for name in order:
        total += len(units[name])
        winner = int(np.argmax(np.round(wanted * total - given, 9)))
        given[winner] += len(units[name])
        place.update({sequence.id: SPLITS[winner] for sequence in units[name]})
    return place


def _in_order(names: Sequence[str], units: dict[str, list[SequenceInfo]], config: SplitRules) -> dict[str, str]:
    """The first units train, then validation, the last ones test; each unit goes where its middle falls."""
    total, seen, place = sum(map(len, units.values())), 0, {}
    for name in names:
        middle = (seen + len(units[name]) / 2) / total
        split = "test" if middle > 1 - config.test else "val" if middle > 1 - config.test - config.val else "train"
        seen += len(units[name])
        place.update({sequence.id: split for sequence in units[name]})
    return place


def _build(draft: Draft, data: Dataset, chosen: dict[str, list[str]]) -> None:
    for name in sorted({sequence.shard for sequence in data.sequences}):
        target = draft.path(name)
        try:
            os.link(data.artifact.path(name), target)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(data.artifact.path(name), target)
    index = [{"id": s.id, "shard": s.shard, "frames": s.frames, "metadata": dict(s.metadata)} for s in data.sequences]
    write_index(draft, index, chosen)
