"""What is probed: one frozen network, seen as features and as outputs.

Legend: B batch, P pooled features, D channels, h w rows and columns of a feature map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from fmdeploy.arrays import Arrays
from fmdeploy.artifact import Artifact
from fmdeploy.models.saved import LoadedModel
from fmdeploy.task import Task


class FeatureMaps(NamedTuple):
    """Frozen features of a batch, float32 on the CPU."""

    pooled_BP: Tensor
    map_BDhw: Tensor


@dataclass(frozen=True)
class Subject:
    """One network under the probes.

    Attributes:
        name: For messages, such as `TEACHER` or `random`.
        task: Whose samples it reads.
        module: The network in evaluation mode; None where there are only outputs (a BUNDLE).
        features: Inputs (B, ...) in numpy to features; None where it has none.
        predict: Inputs (B, ...) to named outputs (B, ...) in numpy; None where its outputs were never trained.
        why: What is missing, where something is: the reason that a rung prints.
        artifact: Where it came from; None for the random baseline.
        loaded: The same with its recipe, for parts that travel with a TEACHER (`objectives.store.load_objective`).
        can_train: Whether its weights can be fine-tuned as they are.
    """

    name: str
    task: Task
    module: nn.Module | None = None
    features: Callable[[Arrays], FeatureMaps] | None = None
    predict: Callable[[Arrays], Arrays] | None = None
    why: str = ""
    artifact: Artifact | None = None
    loaded: LoadedModel | None = None
    can_train: bool = False
