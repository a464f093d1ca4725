"""The locked wheels of the image: versions and hashes of all that is installed, one file per Python of a base image.

`python3.12 -m fmdeploy.jetson.container.lock` writes the file of the Python that runs it anew, for both architectures;
`--constraint FILE` keeps to the versions of that file. It has to be that Python, since pip evaluates `python_version`
for the interpreter it runs in.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from fmdeploy.jetson.container.wheels import MACHINES, build_own, find_checkout, lock_of, resolve

HEAD = "# What the image for Python {python} installs; written by `python{python} -m fmdeploy.jetson.container.lock`.\n"


def collect(folder: Path, found: dict[tuple[str, str], set[str]]) -> None:
    """Add name, version and hash of every wheel in `folder`, but for fmdeploy's own."""
    for wheel in folder.glob("*.whl"):
        name, version = wheel.name.split("-")[:2]
        if name != "fmdeploy":
            found[name.replace("_", "-").lower(), version].add(hashlib.sha256(wheel.read_bytes()).hexdigest())


def render(found: dict[tuple[str, str], set[str]], python: str) -> str:
    """A requirements file of pip, which then takes these files and no others."""
    lines = [" ".join([f"{name}=={version}", *(f"--hash=sha256:{digest}" for digest in sorted(digests))])
             for (name, version), digests in sorted(found.items())]
    return HEAD.format(python=python) + "\n".join(lines) + "\n"


def main() -> int:
    """Fetch for both architectures, and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--constraint", type=Path)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    constraints = parser.parse_args().constraint
    with tempfile.TemporaryDirectory(prefix="fmdeploy-lock-") as scratch:
        own = build_own(Path(scratch), find_checkout())
        for arch in MACHINES:
            folder = Path(scratch, arch)
            resolve(folder, own, python=python, arch=arch, constraints=constraints)
            collect(folder, found)
    lock = lock_of(python)
    lock.write_text(render(found, python), encoding="utf-8")
    print(f"{lock}: {len(found)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
