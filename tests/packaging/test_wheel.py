"""The wheel, built from the source distribution without network, holds the tree and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from support.trees import tracked_copy

NOT_SHIPPED = {".md", ".pyc"}


@pytest.fixture(scope="module")
def tree(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the repository."""
    return tracked_copy(root, tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def dist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def shipped(tree: Path) -> dict[str, bytes]:
    """Files of the package in the tree, links followed: name in the wheel → content."""
    package = tree / "src" / "fmdeploy"
    found = {}
    for top, folders, names in os.walk(package, followlinks=True):
        folders[:] = [f for f in folders if f != "__pycache__"]
        for name in names:
            path = Path(top) / name
            if path.suffix not in NOT_SHIPPED:
                found[f"fmdeploy/{path.relative_to(package).as_posix()}"] = path.read_bytes()
    return found


def test_wheel_equals_tree(tree: Path, dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        inside = {name: wheel.read(name) for name in wheel.namelist() if not name.endswith(("/", ".md"))}
    package = {name: body for name, body in inside.items() if name.startswith("fmdeploy/")}
    expected = shipped(tree)
    assert sorted(package) == sorted(expected)
    assert [n for n in expected if package[n] != expected[n]] == []


def test_wheel_has_one_top_level_name(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        roots = {name.split("/")[0] for name in wheel.namelist()}
        licence = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
    assert {r for r in roots if not r.endswith(".dist-info")} == {"fmdeploy"}
    assert len(licence) == 1


def test_source_distribution_holds_real_files(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        links = [m.name for m in archive if m.issym() or m.islnk()]
        names = {m.name.partition("/")[2] for m in archive.getmembers()}
    assert links == []
    assert "src/fmdeploy/runtime/__init__.py" in names


def test_a_checkout_without_links_does_not_build(tree: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tree, tmp_path / "broken", symlinks=True)
    link = broken / "src" / "fmdeploy" / "runtime"
    link.unlink()
    link.write_text("../../runtime")  # what git writes where core.symlinks is false
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=broken, capture_output=True, text=True,
                          check=False)
    assert done.returncode != 0
    assert "git config core.symlinks true" in done.stderr


def test_console_script_names_the_command_line(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert "fmdeploy = fmdeploy.cli:main" in wheel.read(points).decode()
