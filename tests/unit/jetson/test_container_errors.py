"""What users meet when something is missing: one line, the right exit code, the fix. No engine is needed here."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fmdeploy.errors import InputError, MissingError
from fmdeploy.jetson.container.run import check_bundle, prepare_sockets
from fmdeploy.jetson.container.wheels import copy_wheels, foreign, gather, pip
from support.processes import FMDEPLOY


def fmdeploy(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*FMDEPLOY, *arguments], capture_output=True, text=True, check=False,
                          env={**os.environ, **environment})


@pytest.mark.parametrize("verb", [("build",), ("run", "/nowhere")])
def test_no_engine(verb: tuple[str, ...], tmp_path: Path) -> None:
    done = fmdeploy("container", *verb, DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    assert "the Docker engine does not answer" in done.stderr
    assert "systemctl start docker" in done.stderr


def test_a_hostile_base_never_reaches_the_engine(tmp_path: Path) -> None:
    done = fmdeploy("container", "build", "--base", "debian\nRUN id", DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    assert done.returncode == 2
    assert "'base': is not the name of an image: it holds '\\n'" in done.stderr


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a BUNDLE"):
        check_bundle(tmp_path)


def test_the_socket_folder_belongs_to_the_user(tmp_path: Path) -> None:
    me = f"{os.getuid()}:{os.getgid()}"
    prepare_sockets(tmp_path / "run", me)
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o750
    prepare_sockets(tmp_path / "run", me)  # again
    with pytest.raises(MissingError, match=r"may not write into the folder.*sudo install -d -o 4321 -g 4321 -m 0750"):
        prepare_sockets(tmp_path / "run", "4321:4321")
    (tmp_path / "run").chmod(0o757)
    prepare_sockets(tmp_path / "run", "4321:4321")


def test_other_versions_are_chosen_by_the_python_that_will_use_them(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"expected 3\.9, found 3\.\d+\)\. Run fmdeploy with python3\.9"):
        gather(tmp_path, source=None, python="3.9", arch="arm64", constraints=tmp_path)


def test_a_python_for_which_nothing_is_locked(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"wheels-cp39\.lock: no wheels are locked for Python 3\.9\..*--constraints"):
        gather(tmp_path, source=None, python="3.9", arch="arm64", constraints=None)


def test_a_wheelhouse_without_fmdeploy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no wheel of fmdeploy"):
        copy_wheels(tmp_path, tmp_path / "out")


def test_foreign_wheels_name_every_glibc_up_to_the_base() -> None:
    flags = list(foreign("3.10", "riscv64"))
    assert "manylinux_2_35_riscv64" in flags
    assert "manylinux_2_36_riscv64" not in flags
    assert "cp310" in flags
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    arch = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    assert not list(foreign(here, arch)), "pip knows best what fits this machine"
    assert "cp39" in list(foreign("3.9", arch))


def test_pip_failure_is_one_line() -> None:
    with pytest.raises(MissingError, match=r"pip download failed: .*no such option"):
        pip(["download", "--no-such-flag"])


def test_files_for_a_host(tmp_path: Path) -> None:
    done = fmdeploy("container", "write", str(tmp_path), "--out", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == ["compose.yaml", "fmdeploy-container.service", "fmdeploy.service"]
