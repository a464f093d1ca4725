"""The wheelhouse of an image: all that is installed, fetched before the build, so that the build needs no network."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fmdeploy.errors import InputError, MissingError

EXTRAS = "serve,sign"
PROJECT_FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
LOCKS = Path(__file__).resolve().parents[1]
GLIBC = {"3.10": 35, "3.11": 36, "3.12": 39}
"""Python of the base image → minor version of its glibc 2.x: Ubuntu 22.04, Debian 12, Ubuntu 24.04."""
MACHINES = {"arm64": "aarch64", "amd64": "x86_64"}
SETUPTOOLS = 77
LAST_LINES = 4


def gather(folder: Path, *, source: Path | None, python: str, arch: str, constraints: Path | None) -> None:
    """Fill `folder` with wheels of fmdeploy, of what it needs on the device, and of pip.

    Args:
        folder: Where the wheels go.
        source: A checkout of fmdeploy; None means the one that runs now.
        python: Python of the base image, like 3.10.
        arch: Architecture of the base image, as Docker names it.
        constraints: A pip constraints file to choose other versions within; None means the locked wheels.

    Raises:
        MissingError: pip cannot fetch them, nothing is locked for this Python, or there is no checkout.
    """
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if constraints and here != python:
        # pip evaluates `python_version < "3.11"` for the interpreter that runs it, not for --python-version.
        raise MissingError("wheels for the image must be chosen by the image's version of Python", expected=python,
                           found=here, fix=f"Run fmdeploy with python{python}, or leave --constraints out")
    if not (constraints or lock_of(python).is_file()):
        raise MissingError(f"no wheels are locked for Python {python}", where=lock_of(python),
                           fix=f"Run fmdeploy with python{python} and give --constraints, or give --wheels")
    own = build_own(folder, source or find_checkout())
    if constraints:
        resolve(folder, own, python=python, arch=arch, constraints=constraints)
    else:
        fetch_locked(folder, lock_of(python), python=python, arch=arch)


def lock_of(python: str) -> Path:
    """Where the locked wheels of a Python are named (fmdeploy.jetson.container.lock writes it)."""
    return LOCKS / f"wheels-cp{python.replace('.', '')}.lock"


def fetch_locked(folder: Path, lock: Path, *, python: str, arch: str) -> None:
    """Fetch exactly the files whose hashes are in `lock`; whichever Python runs this, nothing is left to choose."""
    pip(["download", "--dest", str(folder), "--no-deps", "--require-hashes", "--only-binary=:all:",
         *foreign(python, arch), "--requirement", str(lock)])


def resolve(folder: Path, own: Path, *, python: str, arch: str, constraints: Path | None) -> None:
    """Let pip choose what the wheel `own` needs, as new as `constraints` allow."""
    limits = ["--constraint", str(constraints)] if constraints else []
    pip(["download", "--dest", str(folder), "--only-binary=:all:", *foreign(python, arch), *limits,
         f"{own}[{EXTRAS}]", "pip"])


def find_checkout() -> Path:
    """The checkout that this module runs from.

    Raises:
        MissingError: fmdeploy was installed from a wheel, and cannot be made into one again.
    """
    root = Path(__file__).resolve().parents[2]
    if (root / "pyproject.toml").is_file() and (root / "src" / "fmdeploy").is_dir():
        return root
    raise MissingError("this fmdeploy was not installed from a checkout, so its wheel cannot be built",
                       fix="Give --source CHECKOUT, or --wheels with a folder of wheels")


def build_own(folder: Path, source: Path) -> Path:
    """Build the wheel of `source` into `folder`, from a copy, so that no build folder is left in the checkout.

    Raises:
        InputError: `source` is no checkout.
    """
    if missing := [name for name in PROJECT_FILES if not (source / name).is_file()]:
        raise InputError("is not a checkout of fmdeploy", where=source, found=f"no {missing[0]}",
                         fix="Give another --source")
    with tempfile.TemporaryDirectory(prefix="fmdeploy-source-") as scratch:
        for name in PROJECT_FILES:
            shutil.copy2(source / name, scratch)
        # Links are followed: the copy holds the stages as plain folders.
        unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(source / "src", Path(scratch, "src"), ignore=unwanted)
        isolation = ["--no-build-isolation"] if _has_setuptools() else []
        pip(["wheel", "--no-deps", *isolation, "--wheel-dir", str(folder), scratch])
    return next(folder.glob("fmdeploy-*.whl"))


def foreign(python: str, arch: str) -> Iterator[str]:
    """Flags of `pip download` for a base image unlike this machine and its Python; none where it is alike."""
    machine = MACHINES.get(arch, arch)
    if machine == platform.machine() and python == f"{sys.version_info.major}.{sys.version_info.minor}":
        return
    yield from ("--python-version", python, "--implementation", "cp")
    for abi in (f"cp{python.replace('.', '')}", "abi3", "none"):
        yield from ("--abi", abi)
    for minor in range(17, GLIBC.get(python, 35) + 1):
        yield from ("--platform", f"manylinux_2_{minor}_{machine}")
    yield from ("--platform", f"manylinux2014_{machine}")


def pip(arguments: list[str]) -> None:
    """Run pip of this Python.

    Raises:
        MissingError: it fails; the text holds its last lines.
    """
    done = subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
                          capture_output=True, text=True, check=False)
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise MissingError(f"pip {arguments[0]} failed: {' | '.join(told[-LAST_LINES:])}",
                           fix="Check the network and the index, or give --wheels with a folder of wheels")


def copy_wheels(given: Path, folder: Path) -> None:
    """Copy a ready wheelhouse.

    Raises:
        InputError: it lacks fmdeploy or pip.
    """
    for name in ("fmdeploy", "pip"):
        if not list(given.glob(f"{name}-*.whl")):
            raise InputError(f"holds no wheel of {name}", where=given,
                             fix="Fill it with pip download, and with pip wheel for fmdeploy")
    for wheel in given.glob("*.whl"):
        shutil.copy2(wheel, folder)


def _has_setuptools() -> bool:
    if importlib.util.find_spec("setuptools") is None:
        return False
    return int(importlib.metadata.version("setuptools").split(".")[0]) >= SETUPTOOLS
