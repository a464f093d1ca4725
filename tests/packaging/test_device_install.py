"""What the device gets: the wheel with its serving and signing extras in an environment of its own, from the index."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from support.runtimes import toy_bundle
from support.trees import tracked_copy

pytestmark = pytest.mark.slow
EXTRAS = "serve,sign"
MAX_MB = 120
ABSENT = ("torch", "onnx", "transformers", "accelerate", "nvidia-modelopt", "onnxscript", "matplotlib", "scipy", "pandas",
          "highway-env", "openvino", "docker", "pyyaml")
NEEDED = ("click", "numpy", "onnxruntime", "pydantic", "rich", "safetensors", "starlette", "uvicorn", "prometheus-client",
          "model-signing", "cryptography")
# What runs on the device: these, and every module of the package that they import.
ROOTS = ("runtime", "jetson")
READERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def quiet(argv: list[Any], **options: Any) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, env=environment, check=False, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheels(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of this tree and every wheel that its install downloads."""
    tree, out = tracked_copy(root, tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("wheels")
    quiet([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, tree])
    built = next(out.glob("fmdeploy-*.whl"))
    quiet([sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:", "--constraint",
           root / "constraints.txt", "--dest", out, f"{built}[{EXTRAS}]"])
    return out


@pytest.fixture(scope="module")
def device(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with exactly these wheels; nothing else is asked."""
    folder = tmp_path_factory.mktemp("device") / "venv"
    quiet([sys.executable, "-m", "venv", "--without-pip", folder])
    python = folder / "bin" / "python"
    built = next(wheels.glob("fmdeploy-*.whl"))
    quiet([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--find-links", wheels,
           f"{built}[{EXTRAS}]"])
    return python


def test_wheels_of_the_device_are_small(wheels: Path) -> None:
    sizes = {path.name.partition("-")[0]: path.stat().st_size for path in wheels.glob("*.whl")}
    total = sum(sizes.values())
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:6]
    print(f"{len(sizes)} wheels, {total / 1e6:.1f} MB: " + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in largest))
    assert len(sizes) > len(NEEDED)
    assert total / 1e6 <= MAX_MB


def test_installed_packages_can_neither_train_nor_unpickle_checkpoints(device: Path) -> None:
    code = "import importlib.metadata as m, json; print(json.dumps(sorted(d.metadata['Name'] for d in m.distributions())))"
    names = {normal(name) for name in json.loads(quiet([device, "-c", code]))}
    assert names.isdisjoint(map(normal, ABSENT)), names & set(ABSENT)
    assert {normal(name) for name in (*NEEDED, "fmdeploy")} <= names
    print(f"{len(names)} packages: {', '.join(sorted(names))}")


def test_bundle_runs_there_and_help_answers(device: Path, tmp_path: Path) -> None:
    help_text = quiet([device, "-m", "fmdeploy", "--help"])
    assert "serve" in help_text
    assert "verify" in help_text
    code = f"""
import json, sys
from fmdeploy.runtime import Runtime, open_bundle
bundle = open_bundle({str(toy_bundle())!r})
with_golden = Runtime(bundle)
frame = with_golden.infer(bundle.golden.sample(0))
print(json.dumps([with_golden.tier, sorted(frame.outputs), sorted(set(sys.modules) & {{"torch", "onnx", "yaml"}})]))
"""
    tier, outputs, foreign = json.loads(quiet([device, "-W", "error", "-c", code], cwd=tmp_path))
    assert tier in ("int8-cpu", "fp32")
    assert outputs == ["bev", "scene"]
    assert foreign == []


def test_every_module_of_the_device_half_imports_there(device: Path, wheels: Path) -> None:
    with zipfile.ZipFile(next(wheels.glob("fmdeploy-*.whl"))) as wheel:
        files = [name for name in wheel.namelist() if name.startswith(tuple(f"fmdeploy/{part}/" for part in ROOTS))]
    names = [name[:-3].replace("/", ".").removesuffix(".__init__") for name in files if name.endswith(".py")]
    code = f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)\nprint(len({names!r}))"
    assert int(quiet([device, "-c", code])) > 50


def modules(root: Path) -> dict[str, Path]:
    """Module name to file, stage links followed."""
    package = root / "src" / "fmdeploy"
    found = {}
    for top, folders, names in os.walk(package, followlinks=True):
        folders[:] = [f for f in folders if f != "__pycache__"]
        for name in names:
            if name.endswith(".py") and not name.startswith("__main"):
                parts = ["fmdeploy", *Path(top).relative_to(package).parts, *([] if name == "__init__.py" else [name[:-3]])]
                found[".".join(parts)] = Path(top, name)
    return found


def imported(path: Path) -> set[str]:
    """Dotted names that a module imports anywhere, also late and by name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_no_module_of_the_device_half_reads_pickles(root: Path) -> None:
    files = modules(root)
    waiting = [name for name in files if name.split(".")[1:2] and name.split(".")[1] in ROOTS]
    seen: set[str] = set()
    wrong: dict[str, set[str]] = {}
    while waiting:
        name = waiting.pop()
        if name in seen or name not in files:
            continue
        seen.add(name)
        names = imported(files[name])
        if bad := {one for one in names if one.partition(".")[0] in READERS}:
            wrong[name] = bad
        if "allow_pickle=True" in files[name].read_text():
            wrong[name] = {"allow_pickle=True"}
        waiting += [one for one in names if one.startswith("fmdeploy.")]
    assert len(seen) > 60
    assert wrong == {}
