"""What a process of a training run holds, in bytes.

With `--sharding fsdp` each process holds a share of every tensor, cut along its first axis (arXiv:1910.02054), and for
the time that it computes with them the whole weights of a block (`training.sharding`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from fmdeploy.training.config import StepConfig
from fmdeploy.training.sharding import units

AT_ONCE = 2  # blocks that are whole at the same time: the next one is fetched while one computes
MOMENTS = 2  # of AdamW


@dataclass(frozen=True)
class State:
    """Bytes of what lasts from step to step and of what comes and goes around it, for the process that holds most.

    Attributes:
        weights: Parameters and buffers.
        gradients: Of what is trained.
        optimizer: AdamW's moments.
        average: Averaged weights.
        gathered: Whole weights and gradients that stand beside the shares while a step computes.
        checkpoint: Copies that are made to write a checkpoint: of everything, and once more where shares are gathered.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    gathered: int
    checkpoint: int

    @property
    def lasting(self) -> int:
        """What is held at any time."""
        return self.weights + self.optimizer + self.average


def state_of(model: nn.Module, config: StepConfig, processes: int) -> State:
    """What training `model` as `config` says holds in each of `processes` processes, activations left out."""
    sharded = config.sharding == "fsdp"
    held: Callable[[Tensor], int] = (lambda tensor: _share(tensor, processes)) if sharded else _bytes
    parameters, trained = set(model.parameters()), [p for p in model.parameters() if p.requires_grad]
    buffers = _sum(model.buffers(), _bytes)
    named = list(model.state_dict(keep_vars=True).values())
    whole = _sum(named, _bytes) * (2 if config.ema else 1) + MOMENTS * _sum(trained, _bytes)
    return State(
        weights=_sum(parameters, held) + buffers,
        gradients=_sum(trained, held),
        optimizer=MOMENTS * _sum(trained, held),
        average=sum(held(v) if v in parameters else _bytes(v) for v in named) if config.ema else 0,
        gathered=_gathered(model) if sharded else 0,
        checkpoint=whole * (2 if sharded else 1),
    )


def _gathered(model: nn.Module) -> int:
    """The rest and the largest blocks as whole weights, and the whole gradients of the rest and of one block."""
    blocks = [list(unit.parameters()) for unit in units(model)]
    inside = {parameter for block in blocks for parameter in block}
    rest = [parameter for parameter in model.parameters() if parameter not in inside]
    largest = sorted((_sum(block, _bytes) for block in blocks), reverse=True)
    trained = [_sum((p for p in block if p.requires_grad), _bytes) for block in (rest, *blocks)]
    return _sum(rest, _bytes) + sum(largest[:AT_ONCE]) + trained[0] + max(trained[1:], default=0)


def _sum(tensors: Iterable[Tensor], size: Callable[[Tensor], int]) -> int:
    return sum(size(tensor) for tensor in tensors)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _share(tensor: Tensor, processes: int) -> int:
    """Bytes of the largest of the shares, which are rows of the first axis."""
    rows = -(-tensor.shape[0] // processes)
    return rows * (_bytes(tensor) // max(1, tensor.shape[0]))
