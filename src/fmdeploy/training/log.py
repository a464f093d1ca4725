"""One JSON object a step, in `log.jsonl`: only numbers that are the same in every run of the same configuration."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class StepLog:
    """Appends records of steps, starting after the first `done` that are there already.

    Args:
        path: The file; None writes nothing (ranks above 0).
        done: Steps whose records are kept; later ones, from before a kill, are cut off.
    """

    def __init__(self, path: Path | None, done: int) -> None:
        self.path = path
        if path is not None:
            lines = path.read_text(encoding="utf-8").splitlines()[:done] if path.is_file() else []
            unfinished = path.with_name(f".{path.name}.tmp")
            unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            os.replace(unfinished, path)  # a kill while resuming must not cost the first records

    def write(self, records: Sequence[Mapping[str, float]]) -> None:
        """Append one line for each record; a number that is not finite becomes null."""
        if self.path is None or not records:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            for record in records:
                stream.write(json.dumps({key: _number(value) for key, value in record.items()}) + "\n")


def _number(value: float) -> float | None:
    if isinstance(value, int):
        return value
    return float(f"{value:.8g}") if math.isfinite(value) else None


def parse_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log, one a step."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
