"""What lowering changed, tensor by tensor, in numbers that a person can judge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Change:
    """One tensor whose numbers are no longer those of the source."""

    tensor: str
    what: str
    cost_db: float
    """How much coarser its grid became, in dB of quantisation noise; 0 where nothing was lost."""

    def __str__(self) -> str:
        return f"{self.tensor}: {self.what}" + (f", {self.cost_db:.1f} dB coarser" if self.cost_db > 0.05 else "")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"tensor": self.tensor, "what": self.what, "cost_db": round(self.cost_db, 3)}


@dataclass
class Log:
    """Collects what happened on the way."""

    changes: list[Change] = field(default_factory=list)
    stays_float: list[tuple[str, str]] = field(default_factory=list)
    """Nodes that keep a float operand, and why."""

    def change(self, tensor: str, what: str, cost_db: float = 0.0) -> None:
        """Note a changed tensor."""
        self.changes.append(Change(tensor, what, cost_db))
