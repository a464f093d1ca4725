"""What an objective is: its own parts, what it needs of a batch, its losses, and what follows each step.

Legend: B samples of one process's share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from numpy.random import Generator
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from fmdeploy.task import Arrays, Samples, Task
from fmdeploy.training.loop import Losses, StoppedError, Tensors
from fmdeploy.training.sampler import Index


class CollapsedError(StoppedError):
    """The representation lost its variety: every input gets nearly the same features.

    Attributes:
        healthy_steps: Steps done when it was last seen in good health.
    """

    healthy_steps: int = 0


class ObjectiveConfig(BaseModel):
    """Base of an objective's options, given as `--set NAME.KEY=VALUE`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Objective(nn.Module, ABC):
    """One way to train a backbone.

    It is a module: what it owns (decoder, predictor, moving-average target, queue) is trained and checkpointed with
    the teacher, and dropped afterwards unless `kept`. It holds no reference to the teacher, which `losses` is given.

    Attributes:
        name: As in `--objective NAME`.
        needs_labels: Whether it reads `batch["targets"]`, and so trains the heads too.
        kept: Whether its own weights stay in the TEACHER (a world model is of use afterwards).
        shardable: Whether it trains with `--sharding fsdp`: it then touches weights inside the forward pass alone.
        Config: Its options.
    """

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False
    kept: ClassVar[bool] = False
    shardable: ClassVar[bool] = True
    Config: ClassVar[type[ObjectiveConfig]] = ObjectiveConfig

    def __init__(self, task: Task, teacher: nn.Module, config: ObjectiveConfig, *, steps: int) -> None:
        """Make the objective's own parts.

        Args:
            task: Whose inputs these are.
            teacher: To read sizes from (and to copy a target from); not kept.
            config: An instance of `Config`.
            steps: Of the whole run, for schedules.
        """
        super().__init__()
        self.task, self.config, self.steps = task, config, steps

    def arrays(self, samples: Samples, index: Index, rngs: Sequence[Generator]) -> Mapping[str, Arrays]:
        """More kinds of arrays for the samples `index` (B,), made in numpy in the loader's thread. Default: none.

        Called before mirroring, which is applied to every kind but those in `unmirrored`.

        Args:
            samples: The training samples.
            index: Numbers of this share's samples.
            rngs: One generator a sample, keyed by seed, step and place in the whole step's batch, so that any number
                of processes draws the same.
        """
        return {}

    @property
    def unmirrored(self) -> frozenset[str]:
        """Kinds of `arrays` that mirroring must leave alone (masks, indices)."""
        return frozenset()

    @abstractmethod
    def losses(self, teacher: nn.Module, batch: Tensors) -> Losses:
        """Named scalar parts of the loss; their sum is minimised. Runs inside the wrapped module's forward."""

    def after_step(self, teacher: nn.Module, step: int) -> Mapping[str, Tensor]:
        """What follows an optimiser step (0 for the first): move a target, watch for collapse. Default: nothing.

        Returns:
            Scalars for the log, such as `feature_std`.

        Raises:
            CollapsedError: the run is not worth going on with.
        """
        return {}

    def resting(self, teacher: nn.Module, step: int) -> Sequence[nn.Parameter]:
        """Parameters of its own and of the teacher that it does not train in a step. Default: none.

        Its losses still give each a gradient, which is zero: DistributedDataParallel waits for all. What no objective
        trains is left as it is, by weight decay and momentum, too.
        """
        return ()

    def changes(self) -> Sequence[int]:
        """Steps, counted from 0, from which on a step is other work than before: for plans. Default: none."""
        return ()

    def look_ahead(self, step: int, processes: int = 1) -> None:
        """Do from now on the work of step `step`, without having been trained: for plans. Default: all are alike.

        Args:
            step: From 0.
            processes: Do it as the first of so many, where there is one.
        """
