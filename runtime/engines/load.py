"""The engine of a tier, loaded; where it is missing or unfit and a build is allowed, the one that was built instead."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fmdeploy.errors import FmdeployError, MissingDependencyError, MissingError
from fmdeploy.jetson.preflight import import_problem
from fmdeploy.runtime.backends.planfault import PlanError
from fmdeploy.runtime.backends.protocol import Backend
from fmdeploy.runtime.backends.tensorrt import TensorRtBackend
from fmdeploy.runtime.backends.tensorrt_api import load_api
from fmdeploy.runtime.bundle import Bundle
from fmdeploy.runtime.engines.find import find_engine
from fmdeploy.runtime.engines.key import Place, request_here
from fmdeploy.runtime.engines.rebuild import COMMAND, rebuild
from fmdeploy.runtime.loading import Terms


def load_engine(bundle: Bundle, variant: str, terms: Terms) -> tuple[Backend, str]:
    """Load the engine of one model file.

    Returns:
        What runs it, and what is worth a note about it.

    Raises:
        MissingDependencyError: TensorRT does not import; a missing shared library is named.
        MissingError: there is no GPU, or the engine could not be built.
        PlanError: there is no engine that belongs here, and none may be built.
    """
    assert terms.engines is not None
    if problem := import_problem("tensorrt"):
        raise MissingDependencyError(problem)
    place = terms.place or Place()
    try:
        return _load(bundle, variant, terms.engines, place)
    except PlanError as error:
        if not terms.build_missing:
            raise
        _build_again(bundle, variant, terms.engines, place, terms, error)
        return _load(bundle, variant, terms.engines, place)


def _load(bundle: Bundle, variant: str, engines: Path, place: Place) -> tuple[Backend, str]:
    api, cuda = load_api("tensorrt"), place.cuda()
    engine = find_engine(engines, request_here(bundle, variant, api, Place(place.root, lambda: cuda)))
    try:
        backend = TensorRtBackend(engine.plan, bundle.io, api=api, cuda=cuda, where=engine.root)
    except PlanError as error:
        error.root = engine.root
        raise
    without = f"no CUDA graph: {backend.without_graph}" if backend.without_graph else ""
    return backend, "; ".join(text for text in (engine.note, without) if text)


def _build_again(
    bundle: Bundle, variant: str, engines: Path, place: Place, terms: Terms, error: PlanError
) -> None:
    """Build what is missing or unfit.

    Raises:
        MissingError: that failed, too; both reasons are in the text.
    """
    try:
        if error.root is not None:
            set_aside(error.root, error.code.value)
        rebuild(bundle, variant, engines, place=place, floor_mib=terms.floor_mib,
                command=terms.build_command or COMMAND)
    except (FmdeployError, OSError) as failure:
        raise MissingError(f"{error}; and no other could be built: {failure}") from failure


def set_aside(root: Path, code: str) -> Path:
    """Move an engine that is ours and unfit out of the way of its successor; it stays for whoever wants to look."""
    aside = root.with_name(f".{root.name}.{code.lower()}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(root, aside)
    return aside
