"""The one place that talks to `accelerate`, and that decides which arithmetic a device is fast at."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch

from fmdeploy.errors import ConfigError, FmdeployError
from fmdeploy.optional import require
from fmdeploy.training.config import Precision
from fmdeploy.training.distributed import world

ResultT = TypeVar("ResultT")
MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(wanted: Precision) -> Precision:
    """Replace `auto` by what this machine computes fast without losing range.

    bf16 on a GPU that has it and on a CPU with AVX512-BF16 or AMX, fp16 on an older GPU, else fp32: a CPU without
    bf16 instructions emulates them and is slower than in fp32.

    Raises:
        ConfigError: fp16 was asked for on a CPU.
    """
    on_gpu = torch.cuda.is_available()
    if wanted == "fp16" and not on_gpu:
        raise ConfigError("fp16 training needs a GPU", where="precision", fix="Use bf16, fp32 or auto")
    if wanted != "auto":
        return wanted
    if on_gpu:
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))


def make_accelerator(precision: Precision, sharding: Any = None) -> Any:
    """A fresh `accelerate.Accelerator` for this process, also under `torchrun`.

    Its state is a process-wide singleton that refuses a second precision: two stages in one process need a reset.
    The process group is kept. Without a GPU `cpu` must be said: accelerate would then start a process group under
    `torchrun`, call itself undistributed, and neither average gradients nor wait at barriers.

    Args:
        precision: Of the forward pass.
        sharding: An accelerate plugin for fully sharded training (`training.sharding`); None: replicated.
    """
    accelerate = require("accelerate")
    state, kinds = accelerate.state, accelerate.DistributedType
    state.AcceleratorState._reset_state()
    shared = state.PartialState._shared_state
    if shared.get("distributed_type") == kinds.FSDP:  # left by an earlier stage of this process
        shared["distributed_type"] = kinds.MULTI_GPU
    # The gradients lie in the buckets that are sent, which saves a copy each way.
    handlers = [accelerate.DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    made = accelerate.Accelerator(mixed_precision=MIXED[precision], cpu=not torch.cuda.is_available(),
                                  fsdp_plugin=sharding, kwargs_handlers=handlers)
    if sharding is not None and made.distributed_type == kinds.MULTI_CPU:  # it ignores the plugin there; torch does not
        made.state.distributed_type, made.state.fsdp_plugin = kinds.FSDP, sharding
    return made


def unwrap(accelerator: Any, wrapped: torch.nn.Module, model: torch.nn.Module) -> None:
    """Undo `accelerator.prepare`: it hangs a `forward` on the instance, which would outlive the training."""
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    vars(model).pop("forward", None)


def default_device() -> torch.device:
    """The device that a stage computes on when nothing has been prepared yet."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Compute in `precision` inside the block."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPE[precision])


@contextmanager
def evaluation_mode(module: torch.nn.Module) -> Iterator[None]:
    """No gradients, and BatchNorm and dropout as in use; the former mode comes back afterwards."""
    was_training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        module.train(was_training)


def first_decides(decide: Callable[[], ResultT]) -> ResultT:
    """What the first process finds, given to all of them; what it raises, all raise, and it alone tells of it.

    For checks that read much of the data and say something on the way: once a run is enough.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return decide()
    make_accelerator("fp32")  # starts the process group
    said: list[Any] = [None, None]
    if world()[0] == 0:
        try:
            said[0] = decide()
        except FmdeployError as error:
            said[1] = error
    torch.distributed.broadcast_object_list(said)
    found, problem = said
    if problem is not None:
        problem.told = world()[0] > 0
        raise problem
    return found  # type: ignore[no-any-return]


@contextmanager
def together() -> Iterator[None]:
    """All processes enter and leave the block at the same time.

    Rank 0 may clear the scratch folder of a former run before it enters, and evaluates long after the others have
    nothing left to do.
    """
    accelerator = make_accelerator("fp32")
    accelerator.wait_for_everyone()
    yield
    accelerator.wait_for_everyone()
