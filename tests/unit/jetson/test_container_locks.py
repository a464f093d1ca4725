"""The locked wheels: complete, what the tests here run with, and no file but those whose hashes are named."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fmdeploy.errors import MissingError
from fmdeploy.jetson.container.build import PYTHONS
from fmdeploy.jetson.container.lock import collect, render
from fmdeploy.jetson.container.wheels import EXTRAS, MACHINES, fetch_locked, lock_of

LOCKED = ("3.10", "3.11", "3.12")
LINE = re.compile(r"([a-z0-9.-]+)==(\S+)((?: --hash=sha256:[0-9a-f]{64})+)")


def pins(python: str) -> dict[str, str]:
    """Name → version."""
    lines = [line for line in lock_of(python).read_text().splitlines() if not line.startswith("#")]
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found), "every line is a version with its hashes"
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def test_every_jetpack_has_locked_wheels() -> None:
    assert set(PYTHONS.values()) <= set(LOCKED)


@pytest.mark.parametrize("python", LOCKED)
def test_what_pyproject_asks_for_is_locked(python: str, root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(r for extra in EXTRAS.split(",") for r in project["optional-dependencies"][extra])]
    locked = pins(python)
    wanted = [r for r in map(Requirement, asked) if r.marker is None or r.marker.evaluate({"python_version": python})]
    assert len(wanted) >= 12
    for requirement in wanted:
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement
    assert "pip" in locked
    assert ("tomli" in locked) == (python == "3.10")
    assert not {"fmdeploy", "torch", "onnx", "docker"} & set(locked)


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_image_has_the_versions_that_are_tested(python: str, root: Path) -> None:
    tested = dict(line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if "==" in line)
    tested = {canonicalize_name(name): version for name, version in tested.items()}
    assert {name: version for name, version in pins(python).items() if tested.get(name, version) != version} == {}
    assert set(pins(python)) - set(tested) <= {"pip"}


def test_jetpack_6_has_the_last_onnxruntime_for_its_python() -> None:
    assert pins("3.10")["onnxruntime"] == "1.23.2"


def test_native_wheels_are_locked_for_both_architectures() -> None:
    for python in LOCKED:
        lines = {line.split("==")[0]: line for line in lock_of(python).read_text().splitlines()}
        for name in ("numpy", "onnxruntime", "pydantic-core", "safetensors", "httptools", "uvloop"):
            assert lines[name].count("sha256:") == len(MACHINES), (python, name)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel, in the only place where pip looks."""
    (tmp_path / "index").mkdir()
    path = tmp_path / "index" / "lidar_probe-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lidar_probe-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: lidar-probe\nVersion: 1.0\n")
        archive.writestr("lidar_probe-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    return path


def test_only_a_file_with_the_locked_hash_is_fetched(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    collect(wheel.parent, found)
    lock = tmp_path / "lock"
    lock.write_text(render(found, "3.10"))
    assert f"lidar-probe==1.0 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n" in lock.read_text()
    fetch_locked(tmp_path / "good", lock, python="3.10", arch="arm64")
    assert [path.name for path in (tmp_path / "good").iterdir()] == [wheel.name]

    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("lidar_probe.py", "import os")
    with pytest.raises(MissingError, match="pip download failed: .*lidar_probe"):
        fetch_locked(tmp_path / "bad", lock, python="3.10", arch="arm64")
    assert not list((tmp_path / "bad").glob("*"))
