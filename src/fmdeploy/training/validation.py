"""Early stop: a network is judged on held-out samples now and then, and its best state is the one that stays.

What was judged so far is part of every checkpoint, so that a run that was killed goes on to the same state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Validation:
    """How a run is judged on its way.

    Attributes:
        every: Steps between judgements; the untrained network and the last state are judged, too.
        patience: Judgements in a row without a new best after which the run ends; 0 never ends it early.
        score: Of the network in any mode, without side effects; higher is better, NaN counts as the worst.
    """

    every: int
    patience: int
    score: Callable[[nn.Module], float]


@dataclass
class BestState:
    """The best state that was seen, and every judgement.

    Attributes:
        values: The network's state dict at that moment, as copies.
        judged: Steps done and score, in order.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    judged: list[tuple[int, float]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps done when the best state was reached; the first of equals."""
        return max(self.judged, key=lambda row: (row[1], -row[0]))[0]

    def take(self, model: nn.Module, step: int, score: float) -> None:
        """Record a judgement; keep the state when it is the best so far."""
        score = score if math.isfinite(score) else -math.inf
        self.judged.append((step, score))
        if self.step == step:
            self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def exhausted(self, patience: int) -> bool:
        """Whether the last `patience` judgements brought nothing new."""
        since = sum(step > self.step for step, _ in self.judged)
        return patience > 0 and since >= patience

    def copy_to(self, model: nn.Module) -> None:
        """Put the best state into `model`."""
        with torch.no_grad():
            model.load_state_dict(self.values)

    def to_json(self) -> list[list[Any]]:
        """The judgements; a score that is not finite becomes null."""
        return [[step, score if math.isfinite(score) else None] for step, score in self.judged]

    def restore(self, values: dict[str, Tensor], judged: list[list[Any]]) -> None:
        """Put back what a checkpoint held."""
        self.values = values
        self.judged = [(int(step), -math.inf if score is None else float(score)) for step, score in judged]
