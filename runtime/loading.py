"""From the name of a tier to a loaded backend, or the reason why this machine has none: cheap questions first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fmdeploy.errors import MissingDependencyError, MissingError
from fmdeploy.jetson.preflight import is_installed
from fmdeploy.ortsession import CUDA
from fmdeploy.runtime.backends.onnxrt import OrtBackend
from fmdeploy.runtime.backends.protocol import Backend
from fmdeploy.runtime.bundle import Bundle

if TYPE_CHECKING:
    from fmdeploy.runtime.engines.key import Place

BackendKind = Literal["tensorrt", "cuda", "openvino", "cpu"]
ON_A_JETSON = "On Jetson it comes with JetPack (python3-libnvinfer; a venv needs --system-site-packages)"


@dataclass(frozen=True)
class Tier:
    """One way to run a bundle.

    Attributes:
        name: As users write it.
        backend: What runs it.
        variant: Model file of the bundle.
    """

    name: str
    backend: BackendKind
    variant: str

    @property
    def bit_equal(self) -> bool:
        """Whether two runs of one input must agree in every bit; a GPU may add in another order."""
        return self.backend in ("cpu", "openvino")


@dataclass(frozen=True)
class Terms:
    """On which terms tiers are admitted.

    Attributes:
        engines: Folder of ENGINEs, or one ENGINE; None: there are none.
        build_missing: Whether an engine that is missing or unfit may be built now, which can take minutes.
        target: Target of the budgets, see `trial.budget_here`.
        place: The machine; None: this one.
        floor_mib: With less memory available, no engine is built.
        build_command: What starts fmdeploy; None: this interpreter.
    """

    engines: Path | None = None
    build_missing: bool = False
    target: str | None = None
    place: Place | None = None
    floor_mib: int = 1024
    build_command: tuple[str, ...] | None = None

    @property
    def root(self) -> Path:
        """Folder below which /proc and /etc of the machine are."""
        return Path("/") if self.place is None else self.place.root


def load_backend(bundle: Bundle, tier: Tier, threads: int, terms: Terms) -> tuple[Backend, str]:
    """Load one tier.

    Returns:
        What runs it, and what is worth a note about it.

    Raises:
        MissingError: a package, a shared library, the GPU or the engine is not here.
        ModelFileError: the model or the engine is refused.
    """
    where = bundle.artifact.root / f"model.{tier.variant}.onnx"
    if tier.backend == "tensorrt":
        return _tensorrt(bundle, tier, terms)
    if tier.backend == "openvino":
        return _openvino(bundle, tier, threads, where), ""
    options = {"provider": CUDA} if tier.backend == "cuda" else {}
    return OrtBackend(bundle.model_bytes(tier.variant), bundle.io, threads=threads, where=where, **options), ""


def _openvino(bundle: Bundle, tier: Tier, threads: int, where: Path) -> Backend:
    if not is_installed("openvino"):
        raise MissingDependencyError("needs the Python package openvino",
                                     fix="Install it with: pip install 'fmdeploy[openvino]'")
    from fmdeploy.runtime.backends.openvino import OpenVinoBackend

    return OpenVinoBackend(bundle.model_bytes(tier.variant), bundle.io, threads=threads,
                           int8=tier.variant == "int8", where=where)


def _tensorrt(bundle: Bundle, tier: Tier, terms: Terms) -> tuple[Backend, str]:
    if not is_installed("tensorrt"):
        raise MissingDependencyError("needs the Python package tensorrt", fix=ON_A_JETSON)
    if terms.engines is None:
        raise MissingError("needs an engine, and no folder of engines was named",
                           fix="Build one with fmdeploy build BUNDLE --out ENGINES/NAME and name ENGINES")
    # Late: a machine without TensorRT must not pay for these lines at its start.
    from fmdeploy.runtime.engines.load import load_engine

    return load_engine(bundle, tier.variant, terms)
