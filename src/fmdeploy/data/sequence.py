"""What the index of a DATASET says about one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SequenceInfo:
    """One continuous recording."""

    id: str
    shard: str
    frames: int
    metadata: Mapping[str, Any]

    @property
    def group(self) -> str:
        """Sequences of one group are not independent; they stay in one split."""
        return str(self.metadata.get("simulation", self.id))
