"""Where the data come from (maps, rigs, places, days), and whether models expect events as often as they happen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fmdeploy.data.format import Dataset
from fmdeploy.evaluate.report.sources import Sources
from fmdeploy.evaluate.report.words import count, number, percent

AXES = ("map_version", "map_date", "sensor_rig", "place", "weather", "date")
SHOWN = 8
GUARD = "calibration_guard.json"


@dataclass(frozen=True)
class OriginRow:
    """One key of the metadata: its values with their sequences, in training and held out."""

    key: str
    train: str
    held_out: str


@dataclass(frozen=True)
class EventRow:
    """One event of one model: predicted and observed frequency and their ratio."""

    model: str
    event: str
    predicted: str
    observed: str
    ratio: str
    verdict: str


def origin_rows(sources: Sources) -> list[OriginRow]:
    """Maps, rigs, places and days of the datasets, as far as their sequences say."""
    return [OriginRow(sources.name_of(data) + row.key, row.train, row.held_out)
            for data in sources.datasets for row in _origins(data)]


def _origins(data: Dataset) -> Iterator[OriginRow]:
    training = set(data.splits.get("train", ()))
    held = {i for name, ids in data.splits.items() if name != "train" for i in ids}
    for key in AXES:
        sides = [Counter(str(s.metadata[key]) for s in data.sequences if s.id in ids and key in s.metadata)
                 for ids in (training, held)]
        if any(sides):
            yield OriginRow(key, *(_values(side) for side in sides))
    rigs = {str(s.metadata.get("sensor_rig", "")): s.metadata["rig"] for s in data.sequences
            if isinstance(s.metadata.get("rig"), dict)}
    for name, rig in sorted(rigs.items()):
        yield OriginRow(f"rig {name}".strip(), ", ".join(sorted(rig)), "")


def _values(found: Counter[str]) -> str:
    shown = [f"{value} ({count(number)})" for value, number in sorted(found.items())[:SHOWN]]
    more = len(found) - SHOWN
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "") or "–"


def event_rows(sources: Sources) -> list[EventRow]:
    """The calibration guards that the given TEACHER and STUDENTs carry."""
    rows = []
    for artifact in sources.artifacts:
        if artifact.has(GUARD):
            name = artifact.root.resolve().name
            for event, found in artifact.json(GUARD)["events"].items():
                rows.append(EventRow(name, event, percent(found["predicted"]), percent(found["observed"]),
                                     _ratio(found), VERDICTS[found["trusted"]]))
    return rows


VERDICTS = {True: "trusted", False: "not calibrated", None: "not measured"}


def _ratio(found: dict[str, Any]) -> str:
    return f"{number(found['value'], 2)} [{number(found['low'], 2)}, {number(found['high'], 2)}]"
