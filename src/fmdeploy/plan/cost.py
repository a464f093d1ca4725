"""FLOPs and memory of a training run before it starts."""

from __future__ import annotations

from typing import Any

from torch import nn

from fmdeploy.iospec import IOSpec
from fmdeploy.models import num_parameters
from fmdeploy.plan.fake import Pass, measure_pass
from fmdeploy.training.config import TrainingConfig

FLOAT = 4  # bytes: weights, gradients, moments and averages are float32 in every precision
MIB = 2.0**20


def cost_of(module: nn.Module, io: IOSpec, config: TrainingConfig, *, processes: int = 1) -> dict[str, Any]:
    """What training `module` as `config` says takes.

    Args:
        module: The network.
        io: Its inputs and outputs.
        config: Steps, batch, parts, precision and averaging.
        processes: That share the batch; each holds all weights.

    Returns:
        `params`, `trainable`; `flops` of a sample (forward and whole step), of a step and of the run; `memory_mib` of
        each process: weights, gradients, AdamW's two moments, averaged weights, activations of one part, and their sum
        (without what the libraries take themselves, some 300 MiB for torch on a CPU).
    """
    one = measure_pass(module, io, config.precision)
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return {
        "params": num_parameters(module), "trainable": trainable, "processes": processes,
        "flops": _flops(one, config), "memory_mib": _memory(module, one, config, trainable, processes),
    }


def _flops(one: Pass, config: TrainingConfig) -> dict[str, float]:
    step = one.total_flops * config.batch
    return {"forward_per_sample": one.forward_flops, "per_sample": one.total_flops, "per_step": step,
            "run": step * config.steps}


def _memory(
    module: nn.Module, one: Pass, config: TrainingConfig, trainable: int, processes: int
) -> dict[str, float]:
    part = config.batch / config.accumulation / processes
    state = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    found = {
        "weights": state, "gradients": trainable * FLOAT, "optimizer": 2 * trainable * FLOAT,
        "average": state if config.ema else 0, "activations": one.activation_bytes * part,
    }
    named = {name: round(value / MIB, 3) for name, value in found.items()}
    return {**named, "total": round(sum(found.values()) / MIB, 3)}
