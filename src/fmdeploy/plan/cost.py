"""FLOPs and memory of a training run before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from fmdeploy.data.blocks import BUDGET_BYTES
from fmdeploy.errors import ConfigError
from fmdeploy.models import num_parameters
from fmdeploy.plan.memory import State, state_of
from fmdeploy.plan.step import Phase, Subject, phases
from fmdeploy.training.config import StepConfig
from fmdeploy.training.sharding import refuse_scalars

MIB = 2.0**20
WAITING = 4  # batches that exist at once: one in use, two in the queue, one that is being made (training/loader.py)
LIBRARIES = "the libraries themselves, some 300 MiB for torch on a CPU"
WORKSPACE = "results that an operator frees again, and what processes send each other"
KEPT = f"what stays decoded of the dataset, for bev-occupancy some {BUDGET_BYTES / MIB:.0f} MiB at most"
LABELS = "the loss against labels, of which only a dataset knows the shape: --data counts it"


def cost_of(subject: Subject, config: StepConfig, *, processes: int = 1) -> dict[str, Any]:
    """What training `subject` as `config` says takes.

    Args:
        subject: Teacher, objectives and samples.
        config: Steps, batch, parts, precision, averaging and sharding.
        processes: That share the batch; without sharding each holds all weights.

    Returns:
        `params` of the teacher and of each objective's own parts, `trainable` ones of them; `flops` of a sample, of a
        step (both the mean over the run) and of the run; `memory_mib` of the process that holds most; `phases` of
        different work; `not_counted`, in words.

    Raises:
        ConfigError: the batch cannot be cut, or there is nothing to shard with.
    """
    pieces = config.accumulation * processes
    if config.batch % pieces:
        raise ConfigError("the batch cannot be cut into equal parts", where="batch", found=config.batch,
                          expected=f"a multiple of {processes} processes x {config.accumulation} parts")
    if config.sharding == "fsdp" and processes == 1:
        raise ConfigError("one process has nothing to shard with", where="sharding", fix="Give --processes")
    size = config.batch // pieces
    whole = subject.whole(config.steps)
    if config.sharding == "fsdp":
        refuse_scalars(whole)
    found = phases(subject, config, size, processes)
    batch = sum(array.nbytes for arrays in subject.batch(whole, 1).values() for array in arrays.values()) * size
    _, targets = subject.samples.batch(np.zeros(1, np.int64))
    unknown = any(choice.kind.needs_labels for choice in subject.choices) and not targets
    return {
        "params": num_parameters(subject.teacher), "trainable": _trained(whole),
        "objectives": {name: _own(module) for name, module in whole.each().items()}, "processes": processes,
        "flops": _flops(found, config, size, pieces), "phases": [_phase(phase, size) for phase in found],
        "memory_mib": _memory(state_of(whole, config, processes), found, config, batch * WAITING),
        "not_counted": [LIBRARIES, WORKSPACE, KEPT, *([LABELS] if unknown else [])],
    }


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _own(module: nn.Module) -> dict[str, int]:
    return {"params": num_parameters(module), "trainable": _trained(module),
            "buffers": sum(buffer.numel() for buffer in module.buffers())}


def _flops(found: Sequence[Phase], config: StepConfig, size: int, pieces: int) -> dict[str, float]:
    forward, total = (sum(phase.steps * flops for phase, flops in each) / config.steps for each in (
        [(phase, phase.share.forward_flops) for phase in found], [(phase, phase.share.total_flops) for phase in found]))
    return {"forward_per_sample": forward / size, "per_sample": total / size, "per_step": total * pieces,
            "run": total * pieces * config.steps}


def _phase(phase: Phase, size: int) -> dict[str, Any]:
    return {"first": phase.first, "steps": phase.steps, "flops_per_sample": phase.share.total_flops / size,
            "activations_mib": round(phase.share.activation_bytes / MIB, 3),
            "counted": "on three small steps, computed" if phase.computed else "on shapes alone"}


def _memory(state: State, found: Sequence[Phase], config: StepConfig, batches: int) -> dict[str, float]:
    activations = max(phase.share.activation_bytes for phase in found)
    parts = {
        "weights": state.weights, "gradients": state.gradients, "optimizer": state.optimizer,
        "average": state.average, "gathered": state.gathered, "batches": batches, "activations": activations,
    }
    step, written = sum(parts.values()), state.lasting + batches + state.checkpoint
    named = {**parts, "step": step, "checkpoint": written, "total": max(step, written)}
    return {name: round(value / MIB, 3) for name, value in named.items()}
