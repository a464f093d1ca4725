"""A runtime image and containers of it, made by the commands a user types, on a real engine."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.containers import ARCH, FACTS, HEALTH_S, PATIENCE_S, PYTHON, Started, fact, fmdeploy


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if FACTS:
        terminalreporter.section("container")
    for text in FACTS:
        terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def client() -> Any:
    """The engine."""
    import docker

    return docker.from_env(timeout=PATIENCE_S)


@pytest.fixture(scope="session")
def image(client: Any) -> Iterator[dict[str, Any]]:
    """What `fmdeploy container build` says of the image it made; the image is removed afterwards."""
    tag, start = f"fmdeploy-test-runtime:{os.getpid()}", time.monotonic()
    done = fmdeploy("container", "build", "--jetpack", "6", "--base", os.environ["FMDEPLOY_BASE"], "--arch", ARCH,
                    "--python", PYTHON, "--tag", tag, "--json")
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    fact(f"image for {ARCH}: {told['size_mib']:.0f} MiB, {len(told['wheels'])} wheels of {told['wheels_mib']:.1f} MiB, "
         f"fetched and built in {time.monotonic() - start:.0f} s")
    yield told
    client.images.remove(tag, force=True)


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder for the socket; its path is short, since the path of a Unix socket has at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="fmdeploy-s-"))
    yield folder / "run"
    shutil.rmtree(folder)


@pytest.fixture
def started(client: Any, image: dict[str, Any], sockets: Path, bundle: Path) -> Iterator[Started]:
    """A healthy container, started by `fmdeploy container run`."""
    name = f"fmdeploy-test-{os.getpid()}"
    start = time.monotonic()
    try:
        done = fmdeploy("container", "run", str(bundle), "--tag", image["tag"], "--name", name, "--sockets", str(sockets),
                        "--engines", name, "--groups", "4242", "--start-s", str(PATIENCE_S), "--health-s", str(HEALTH_S),
                        "--json")
        assert done.returncode == 0, done.stderr
        fact(f"healthy {time.monotonic() - start:.1f} s after `container run`")
        yield Started(client.containers.get(name), json.loads(done.stdout))
    finally:
        for container in client.containers.list(all=True, filters={"name": name}):
            container.remove(force=True)
        for volume in client.volumes.list(filters={"name": name}):
            volume.remove(force=True)


@pytest.fixture(scope="session")
def bundle() -> Path:
    """A small real bundle."""
    from support.runtimes import toy_bundle

    return toy_bundle()
