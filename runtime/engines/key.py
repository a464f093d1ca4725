"""What an engine is bound to: model file, builder, GPU, L4T release. `build` writes it, the runtime asks for it.

All Orins are sm_87: the number of multiprocessors tells a small board from a large one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmdeploy.config import StageConfig
from fmdeploy.errors import MissingError
from fmdeploy.jetson.machine import l4t_release, power_mode
from fmdeploy.runtime.backends.cuda import Cuda, load_cuda
from fmdeploy.runtime.backends.planfault import PlanError, PlanFault
from fmdeploy.runtime.backends.tensorrt_api import Api
from fmdeploy.runtime.bundle import Bundle

# Key → what it means when an engine was built for another one. The power mode is not among them: an engine of another
# mode computes the same, and how fast it is gets measured when its tier is admitted.
BINDING = {
    "model_sha256": PlanFault.OTHER_MODEL,
    "api": PlanFault.OTHER_TENSORRT,
    "version": PlanFault.OTHER_TENSORRT,
    "sm": PlanFault.OTHER_GPU,
    "multiprocessors": PlanFault.OTHER_GPU,
    "l4t": PlanFault.OTHER_L4T,
}
HOST_CODE_FLAG = "VERSION_COMPATIBLE"


class BuildRequest(StageConfig):
    """What identifies an engine: the ONNX file's digest, the builder, and the machine."""

    variant: str
    model_sha256: str
    api: str
    version: str
    flags: tuple[str, ...]
    workspace_mib: int
    sm: str | None
    multiprocessors: int | None
    l4t: str | None
    power_mode: str | None


@dataclass(frozen=True)
class Place:
    """The machine that an engine is built or loaded on; tests give another one."""

    root: Path = Path("/")
    cuda: Callable[[], Cuda] = load_cuda

    def gpu(self) -> tuple[str | None, int | None]:
        """Compute capability and number of multiprocessors, None without a GPU."""
        try:
            cuda = self.cuda()
        except MissingError:
            return None, None
        return cuda.sm(), cuda.multiprocessors()


def request_here(
    bundle: Bundle, variant: str, api: Api, place: Place, *, flags: tuple[str, ...] = (), workspace_mib: int = 0
) -> BuildRequest:
    """What an engine of this model for this machine is identified by."""
    sm, multiprocessors = place.gpu()
    return BuildRequest(variant=variant, model_sha256=bundle.model_sha256(variant), api=api.name, version=api.version,
                        flags=flags, workspace_mib=workspace_mib, sm=sm, multiprocessors=multiprocessors,
                        l4t=l4t_release(place.root), power_mode=power_mode(place.root))


def mismatch(built_for: Mapping[str, Any], wanted: BuildRequest, where: object) -> PlanError | None:
    """Why an engine with this configuration does not belong here; None where it does."""
    for name, fault in BINDING.items():
        here = getattr(wanted, name)
        if built_for.get(name) != here:
            return PlanError(fault, f"was built for another {name.replace('_sha256', ' file')}", where=where,
                             expected=here, found=built_for.get(name))
    if HOST_CODE_FLAG in built_for.get("flags", ()):
        return PlanError(PlanFault.HOST_CODE, "is version-compatible: it brings code for the host, which is never run",
                         where=where)
    return None
