"""What only a GPU can show: the built engine runs, and the golden vectors decide about it. Skipped without one."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from fmdeploy.distill.distill import distill
from fmdeploy.errors import MissingDependencyError
from fmdeploy.export.export import export
from fmdeploy.export.tensorrt.build import build
from fmdeploy.runtime.backends.tensorrt_api import ApiName, installed
from fmdeploy.teacher.cache import cache
from fmdeploy.teacher.train import train
from support.training_data import STUDENT, TEACHER, write_scenes

APIS = [name for name in get_args(ApiName) if installed(name)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a student and its bundle."""
    root = tmp_path_factory.mktemp("gpu")
    write_scenes(root / "data")
    train(data=root / "data", out=root / "teacher", **TEACHER)
    cache(teacher=root / "teacher", data=root / "data", out=root / "features")
    distill(data=root / "data", teacher=root / "teacher", features=root / "features", out=root / "student", **STUDENT)
    export(model=root / "student", data=root / "data", out=root / "bundle", calibration_samples=12)
    return root


@pytest.mark.gpu
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("variant", ["fp32", "fp16", "int8"])
def test_engine_answers_as_the_bundle_says(api: str, variant: str, home: Path, tmp_path: Path) -> None:
    engine = build(bundle=home / "bundle", out=tmp_path / "engine", api=api, variant=variant)
    assert engine.json("inspector.json")
    assert engine.json("build.json")["sm"]
    assert build(bundle=home / "bundle", out=tmp_path / "engine", api=api, variant=variant).digest == engine.digest


@pytest.mark.gpu
def test_torch_tensorrt_compiles_the_student(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch_tensorrt")
    engine = export(model=home / "student", data=home / "data", out=tmp_path / "engine", backend="torch-tensorrt")
    assert engine.has("engine.ep")


def test_torch_tensorrt_that_is_not_installed_is_named(tmp_path: Path) -> None:
    try:
        import torch_tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependencyError, match=r"fmdeploy\[torch-tensorrt\]") as caught:
            export(model=tmp_path / "s", data=tmp_path / "d", out=tmp_path / "o", backend="torch-tensorrt")
        assert caught.value.exit_code == 3
    else:
        pytest.skip("torch-tensorrt is installed")
