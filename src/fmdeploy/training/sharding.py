"""Fully sharded training: every process keeps a part of parameters, gradients and optimiser state (arXiv:1910.02054).

`accelerate` cuts the network in place with torch's `fully_shard`: the transformer blocks of the backbone one by one,
the rest together. Checkpoints and the artifact hold whole tensors, so a run may go on with other processes, or without
sharding. Arithmetic is what it is without: weights are gathered in fp32 and `autocast` chooses from there.

It runs on the CPU under gloo, where tests compare it with one process; it has not run on GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fmdeploy.errors import ConfigError
from fmdeploy.optional import require
from fmdeploy.training.distributed import world
from fmdeploy.training.schedule import BACKBONE

FLAG = "ACCELERATE_USE_FSDP"  # accelerate sets it for the rest of the process


def whole(value: Tensor) -> Tensor:
    """`value` itself, or all of it where every process holds a part; then all processes must call this together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def mine(value: Tensor) -> Tensor:
    """The part of `value` that this process holds, sharing its memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def like(value: Tensor, example: Tensor) -> Tensor:
    """The whole tensor `value`, cut as `example` is."""
    if not isinstance(example, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value, example.device_mesh, example.placements, src_data_rank=None)


def sharding_plugin(model: nn.Module) -> Any:
    """How `accelerate` is to shard `model`.

    Raises:
        ConfigError: there is one process, or a parameter is a scalar, which cannot be cut.
    """
    if world()[1] == 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise ConfigError("one process has nothing to shard with", where="sharding",
                          fix="Start several: torchrun --nproc-per-node N -m fmdeploy ..., or leave --sharding out")
    refuse_scalars(model)
    from torch.distributed.fsdp import MixedPrecisionPolicy

    blocks = _kinds(model)
    return require("accelerate").FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, cpu_ram_efficient_loading=False, state_dict_type="FULL_STATE_DICT",
        mixed_precision_policy=MixedPrecisionPolicy(),  # autocast decides, as without sharding
        auto_wrap_policy="transformer_based_wrap" if blocks else "no_wrap",
        transformer_cls_names_to_wrap=blocks or None,
    )


def refuse_scalars(model: nn.Module) -> None:
    """Refuse what cannot be cut.

    Raises:
        ConfigError: a parameter is a scalar.
    """
    if scalars := [name for name, parameter in model.named_parameters() if parameter.ndim == 0]:
        raise ConfigError(f"the parameter {scalars[0]} is a scalar and cannot be sharded", where="sharding",
                          fix="Leave --sharding out")


def units(model: nn.Module) -> list[nn.Module]:
    """Modules whose weights are gathered when they are called; those of the rest stay whole during a step."""
    kinds = _kinds(model)
    return [module for module in model.modules() if type(module).__name__ in kinds]


def _kinds(model: nn.Module) -> list[str]:
    """Names of the classes that are cut for themselves wherever they stand, also in an objective's own parts."""
    return sorted({type(block).__name__ for block in _blocks(model)})


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Repeated blocks of the backbone: they are called as modules, which is when their weights are gathered."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and BACKBONE in name.split("."):
            yield from (block for block in module if not type(block).__module__.startswith("torch.nn"))


@contextmanager
def flag_kept() -> Iterator[None]:
    """Take back what `accelerate` says to the rest of the process when it is given a plugin."""
    former = os.environ.get(FLAG)
    try:
        yield
    finally:
        os.environ.pop(FLAG, None)
        if former is not None:
            os.environ[FLAG] = former


class Shards:
    """Remembers a network as it is before it is cut, to put the very same modules and parameters together again.

    Args:
        model: Not yet sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept = [
            (module, type(module), dict(module._parameters), {k: dict(v) for k, v in _hooks(module).items()})
            for module in model.modules()
        ]

    def cut(self, accelerator: Any) -> None:
        """To be called when `accelerate` has sharded the network: drop the whole tensors, compute as unsharded ones do.

        Args:
            accelerator: That did it.
        """
        for _, _, parameters, _ in self._kept:
            for parameter in parameters.values():
                if parameter is not None:
                    parameter.data = parameter.data.new_empty(0)
        if accelerator.native_amp:  # for this kind of sharding accelerate leaves autocast to others
            forward = self._model.forward
            convert = require("accelerate.utils").convert_outputs_to_fp32
            self._model.forward = convert(accelerator.autocast()(forward))

    def join(self) -> None:
        """Put the whole network together in every process; all of them must call this."""
        from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
        from torch.distributed._composable_state import _module_state_mapping

        state = {name: whole(value) for name, value in self._model.state_dict().items()}
        for module, kind, parameters, hooks in self._kept:
            module.__class__ = kind
            module._parameters.update(parameters)
            for name, registered in _hooks(module).items():
                registered.clear()  # in place: whoever registered one holds this very dict to remove it
                registered.update(hooks.get(name, {}))
            for key in (REGISTRY_KEY, STATE_KEY):
                vars(module).pop(key, None)
            _module_state_mapping.pop(module, None)
        with torch.no_grad():
            for name, parameter in self._model.named_parameters(remove_duplicate=False):
                parameter.data = state[name]


def _hooks(module: nn.Module) -> dict[str, dict[Any, Any]]:
    return {name: value for name, value in vars(module).items() if "hooks" in name and isinstance(value, dict)}
