"""Engines for tests: ENGINE artifacts around any plan, and a machine that has TensorRT and a GPU to load them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fmdeploy.artifact import Artifact
from fmdeploy.draft import Draft, produce
from fmdeploy.manifest import Kind
from fmdeploy.runtime import loading
from fmdeploy.runtime.backends.cuda import Cuda
from fmdeploy.runtime.backends.tensorrt_api import Api
from fmdeploy.runtime.bundle import Bundle, open_bundle
from fmdeploy.runtime.engines import load
from fmdeploy.runtime.engines.key import BuildRequest, Place
from fmdeploy.runtime.loading import Terms
from support.bundles import fp32_model, int8_model, make_bundle
from support.fake_tensorrt import HostCalls, fake_api, host_cuda, plan_of

RELEASE = "# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic, EABI: aarch64, DATE: Mon Jun 16 16:07:13 UTC 2025"
KEY: dict[str, Any] = {"api": "tensorrt", "version": "10.3.0.26", "flags": ("STRONGLY_TYPED",), "workspace_mib": 1024,
                       "sm": "87", "multiprocessors": 8, "l4t": "36.4.4", "power_mode": None}


def device_bundle(folder: Path) -> Bundle:
    """A bundle with a model for TensorRT (int8) and one for the CPU (fp32)."""
    models = {"fp32": fp32_model(), "int8": int8_model()}
    return open_bundle(make_bundle(folder / "bundle", models=models).root)


def good_plan() -> bytes:
    """What the builder of the stand-in device makes of model.int8.onnx."""
    return plan_of(int8_model())


def make_engine(out: Path, bundle: Bundle, plan: bytes | None = None, **key: Any) -> Artifact:
    """Seal a plan as `fmdeploy build` does; `key` says what it was built for, where that is not this machine."""
    config = BuildRequest(**{"variant": "int8", "model_sha256": bundle.model_sha256("int8"), **KEY, **key})

    def build(draft: Draft) -> None:
        draft.path("engine.plan").write_bytes(good_plan() if plan is None else plan)

    return produce(out, Kind.ENGINE, stage="build", config=config, inputs={"bundle": bundle.artifact}, build=build)


def orin(root: Path, *, available_mib: int = 8192) -> Path:
    """The files of an Orin with JetPack 6."""
    for name, text in (("etc/nv_tegra_release", RELEASE), ("proc/meminfo", f"MemAvailable:  {available_mib * 1024} kB\n"),
                       ("proc/self/status", "VmHWM:\t  100000 kB\nVmRSS:\t  100000 kB\n")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def install_tensorrt(monkeypatch: pytest.MonkeyPatch, api: Api | None = None) -> None:
    """Let this process find a TensorRT that imports."""
    monkeypatch.setattr(loading, "is_installed", lambda name: True)
    monkeypatch.setattr(load, "import_problem", lambda name: "")
    monkeypatch.setattr(load, "load_api", lambda name: api or fake_api())


def terms(folder: Path, *, calls: HostCalls | None = None, **options: Any) -> Terms:
    """Engines in `folder/engines`, on an Orin."""
    place = Place(orin(folder / "root", available_mib=options.pop("available_mib", 8192)),
                  (lambda: Cuda(calls)) if calls else host_cuda)
    (folder / "engines").mkdir(exist_ok=True)
    return Terms(engines=folder / "engines", place=place, **options)


BUILDER = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from fmdeploy.runtime.bundle import open_bundle
from support.engines import make_engine
words = sys.argv[1:]
assert words[0] == "build" and words[4:6] == ["--variant", "int8"], words
if {fails!r}:
    sys.exit({fails!r})
make_engine(Path(words[3]), open_bundle(words[1]))
"""


def builder(folder: Path, fails: str = "") -> tuple[str, ...]:
    """A command that stands for fmdeploy: a process that builds the engine as it is asked to, or fails with a line."""
    script = folder / "builder.py"
    script.write_text(BUILDER.format(path=[path for path in sys.path if path], fails=fails))
    return sys.executable, str(script)
