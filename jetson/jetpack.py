"""What a release of Jetson Linux comes with.

The name of a JetPack is a label: published tables disagree about it. What counts is L4T, TensorRT and CUDA.
"""

from __future__ import annotations

import csv
import functools
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("jetpack.csv")
Version = tuple[int, ...]


class JetPack(NamedTuple):
    """One line of the table."""

    label: str
    l4t_from: Version
    l4t_to: Version
    ubuntu: str
    python: str
    cuda: str
    tensorrt: str
    orin: bool
    note: str


@functools.cache
def table() -> tuple[JetPack, ...]:
    """Return all releases that are known."""
    with TABLE.open(encoding="utf-8", newline="") as stream:
        return tuple(JetPack(row["label"], _version(row["l4t_from"]), _version(row["l4t_to"]), row["ubuntu"],
                             row["python"], row["cuda"], row["tensorrt"], row["orin"] == "yes", row["note"])
                     for row in csv.DictReader(stream))


def jetpack_of(l4t: str) -> JetPack | None:
    """Return what an L4T release comes with; None for one that the table does not know."""
    version = _version(l4t)
    return next((row for row in table() if row.l4t_from <= version <= row.l4t_to), None)


def _version(text: str) -> Version:
    """Three numbers: 36.2 is 36.2.0."""
    parts = [int(part) for part in text.split(".") if part.isdigit()]
    return tuple([*parts, 0, 0, 0][:3])
