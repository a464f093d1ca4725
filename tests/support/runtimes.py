"""Frames for the toy bundle, and bundles made once a process."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from fmdeploy.runtime import GuardConfig, Runtime
from support.bundles import Arrays, inputs, make_bundle


@functools.cache
def toy_bundle() -> Path:
    """The toy bundle, sealed once a process; treat it as read-only."""
    folder = Path(tempfile.mkdtemp(prefix="fmdeploy-toy-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_bundle(folder / "bundle").root


def frame(seed: int = 0) -> Arrays:
    """One good frame; another seed, another content."""
    return {name: array[0].copy() for name, array in inputs(1, seed=1000 + seed).items()}


def runtime(tier: str = "fp32", *, guards: GuardConfig | None = None, deadline_ms: float | None = None) -> Runtime:
    """A runtime on the toy bundle."""
    return Runtime(toy_bundle(), tiers=(tier,), guards=guards, deadline_ms=deadline_ms)
