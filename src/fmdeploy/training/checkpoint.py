"""Everything a run needs to go on after a kill, in one safetensors file that appears in one rename."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fmdeploy.training.ema import WeightAverage
from fmdeploy.training.sharding import like, whole
from fmdeploy.training.validation import BestState
from fmdeploy.training.watch import LossWatch

PATTERN = "checkpoint-*.safetensors"
KEEP = 2


@dataclass
class TrainingState:
    """What changes from step to step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    scaler: Any = None
    best: BestState | None = None
    watch: LossWatch | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, whole, under stable names; all processes must call this where the network is sharded."""
        found = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{key}.{name}"] = value
        if self.average is not None:
            found |= {f"average.{name}": value for name, value in self.average.values.items()}
        if self.best is not None:
            found |= {f"best.{name}": value for name, value in self.best.values.items()}
        return {name: whole(value) for name, value in found.items()}

    def metadata(self) -> dict[str, str]:
        """What is no tensor, as text."""
        scaler = self.scaler.state_dict() if self.scaler is not None else {}
        return {"scaler": json.dumps(scaler), "judged": json.dumps(self.best.to_json() if self.best else []),
                **({"watch": self.watch.to_text()} if self.watch is not None else {})}

    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Put back what `tensors` and `metadata` gave."""
        present = self.model.state_dict()
        self.model.load_state_dict({k: like(v, present.get(k, v)) for k, v in _below("model.", tensors).items()})
        state = _below("optimizer.", tensors)
        keys = {name.partition(".")[0] for name in state}
        for name, parameter in self.model.named_parameters():
            values = {key: state[f"{key}.{name}"] for key in keys if f"{key}.{name}" in state}
            if values:
                self.optimizer.state[parameter] = {key: _laid_out(value, parameter) for key, value in values.items()}
        if self.average is not None:
            self.average.values = {k: like(v, present.get(k, v)) for k, v in _below("average.", tensors).items()}
        if self.best is not None:
            self.best.restore(_below("best.", tensors), json.loads(metadata["judged"]))
        if self.scaler is not None and (scaler := json.loads(metadata["scaler"])):
            self.scaler.load_state_dict(scaler)
        if self.watch is not None and "watch" in metadata:
            self.watch.restore(metadata["watch"])


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """`value` in the memory layout of `parameter`: the fused optimiser walks both as they lie in memory."""
    value = like(value, parameter) if value.shape == parameter.shape else value
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def save_checkpoint(folder: Path, state: TrainingState, step: int, *, write: bool = True) -> Path:
    """Write the state after `step` steps; the file is complete or absent. Only the last two are kept.

    Args:
        folder: Of the checkpoints.
        state: All of it; every process calls this, because each may hold a part.
        step: Steps done.
        write: Whether this process is the one that writes.
    """
    tensors = state.tensors()
    target = folder / f"checkpoint-{step:08d}.safetensors"
    if not write:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".tmp")
    # A copy of each: tied weights are one storage under two names, which safetensors refuses.
    tensors = {name: value.detach().to("cpu").contiguous().clone() for name, value in tensors.items()}
    save_file(tensors, unfinished, metadata={"step": str(step), **state.metadata()})
    with unfinished.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(unfinished, target)
    for old in sorted(folder.glob(PATTERN))[:-KEEP]:
        old.unlink()
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, if there is one."""
    return max(folder.glob(PATTERN), default=None)


def load_checkpoint(path: Path, state: TrainingState, device: torch.device) -> int:
    """Restore `state` from `path` and return the number of steps done."""
    with safe_open(path, framework="pt", device=str(device)) as archive:
        tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 - not a mapping
        metadata = archive.metadata()
    state.restore(tensors, metadata)
    return int(metadata["step"])
