"""Whether a run still learns: its loss is finite and stays near what it was.

A loss that explodes without becoming NaN would train on for hours. So each loss is held against the median of the last
ones; when it lies far above for a while, the run stops. While it does, no checkpoint is written, so the last one is
from before.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from statistics import median

WINDOW = 200  # steps whose median is compared with
FIRST = 20  # steps before anything is judged: the loss of an untrained network says little
PATIENCE = 20  # steps in a row that are too high; a single bad batch passes
SMALL = 1e-2  # a median below this counts as this: a loss that was zero may rise by any factor


@dataclass
class LossWatch:
    """Follows the loss of every step; a function of the losses alone, so that a resumed run judges alike.

    Attributes:
        factor: Times the median is too high; 0 never stops.
        losses: The last losses that were not too high.
        high: How many were too high, in a row.
        since: Step of the first of those.
    """

    factor: float
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    high: int = 0
    since: int = 0

    @property
    def alarmed(self) -> bool:
        """Whether the last loss was too high."""
        return self.high > 0

    @property
    def bound(self) -> float:
        """What a loss may be at most now."""
        middle = median(self.losses)
        return middle + (self.factor - 1) * max(abs(middle), SMALL)

    def diverges(self, step: int, loss: float) -> bool:
        """Take in the loss of `step`, and say whether it is time to stop."""
        if self.factor == 0 or len(self.losses) < FIRST or loss <= self.bound:
            self.losses.append(loss)
            self.high = 0
            return False
        self.since = self.since if self.high else step
        self.high += 1
        return self.high >= PATIENCE

    def to_text(self) -> str:
        """What a checkpoint keeps."""
        return json.dumps({"losses": list(self.losses), "high": self.high, "since": self.since})

    def restore(self, text: str) -> None:
        """Put back what `to_text` gave."""
        kept = json.loads(text)
        self.losses = deque(kept["losses"], maxlen=WINDOW)
        self.high, self.since = int(kept["high"]), int(kept["since"])
