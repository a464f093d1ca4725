"""What may be imported where: the device half needs no training package, and `--help` needs nothing at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Not part of the base install, which is what the device has.
BLOCKED = (
    "torch", "torchvision", "onnx", "onnxsim", "onnxscript", "modelopt", "tensorrt", "tensorrt_rtx", "torch_tensorrt",
    "transformers", "accelerate", "highway_env", "gymnasium", "pygame", "matplotlib", "jinja2", "openvino", "sklearn",
    "webdataset", "timm", "peft", "mcap", "mcap_ros2", "mcap_protobuf", "PIL", "nuscenes", "docker", "starlette",
    "uvicorn", "prometheus_client", "model_signing", "cuda",
)
# Modules whose purpose is torch or onnx. The device never imports them; each must really need one of the two.
MAY_NEED_TRAINING = ("fmdeploy.models", "fmdeploy.training", "fmdeploy.teacher", "fmdeploy.distill",
                     "fmdeploy.quantize", "fmdeploy.export", "fmdeploy.onnxfile", "fmdeploy.estimate", "fmdeploy.plan")
DEVICE = ("fmdeploy.runtime", "fmdeploy.jetson", "fmdeploy.evaluate", "fmdeploy.data", "fmdeploy.tasks")

IMPORT_ALL = """
import importlib, json, os, sys
blocked, names = json.loads(sys.argv[1])
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)
sys.meta_path.insert(0, Wall())
failed = {}
for name in names:
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = f"{type(error).__name__}: {error}"
print(json.dumps(failed))
"""


def module_names(root: Path) -> list[str]:
    """Every module of the package, stage links followed."""
    found = []
    package = root / "src" / "fmdeploy"
    for top, folders, names in os.walk(package, followlinks=True):
        folders[:] = [f for f in folders if f != "__pycache__"]
        for name in names:
            if name.endswith(".py") and name != "__main__.py":
                parts = ["fmdeploy", *Path(top).relative_to(package).parts]
                found.append(".".join(parts if name == "__init__.py" else [*parts, name.removesuffix(".py")]))
    return sorted(found)


def run_python(code: str, *arguments: str) -> Any:
    """Run `code` in a fresh interpreter and parse the JSON it prints last."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def failed(root: Path) -> dict[str, str]:
    """Module → why it does not import where only the base install is."""
    result: dict[str, str] = run_python(IMPORT_ALL, json.dumps([BLOCKED, module_names(root)]))
    return result


def test_everything_else_imports_without_training_packages(failed: dict[str, str]) -> None:
    wrong = {name: why for name, why in failed.items() if not name.startswith(MAY_NEED_TRAINING)}
    assert wrong == {}


def test_what_fails_fails_for_a_blocked_package(failed: dict[str, str]) -> None:
    assert {n: w for n, w in failed.items() if "blocked" not in w and "pip install" not in w} == {}


def test_device_half_was_covered(root: Path, failed: dict[str, str]) -> None:
    names = module_names(root)
    for package in DEVICE:
        assert any(name.startswith(package) for name in names), package
    assert not [name for name in failed if name.startswith(DEVICE)]


def test_help_imports_no_heavy_package() -> None:
    code = """
import json, sys
from fmdeploy.cli import main
try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0, stop.code
print(json.dumps(sorted(set(sys.modules) & {"torch", "numpy", "pydantic", "onnxruntime", "onnx", "rich", "safetensors"})))
"""
    assert run_python(code) == []


def test_a_runtime_starts_without_what_only_the_command_line_needs() -> None:
    code = """
import json, sys
import fmdeploy.runtime.session, fmdeploy.runtime.supervisor.worker
print(json.dumps(sorted(set(sys.modules) & {"pydantic", "pydantic_core", "click", "rich", "importlib.metadata"})))
"""
    assert run_python(code) == []


def test_importing_the_runtime_loads_neither_torch_nor_onnx() -> None:
    code = """
import json, sys
import fmdeploy.runtime, fmdeploy.runtime.session, fmdeploy.runtime.check.check
print(json.dumps(sorted(set(sys.modules) & {"torch", "onnx", "modelopt", "transformers", "matplotlib", "jinja2"})))
"""
    assert run_python(code) == []
