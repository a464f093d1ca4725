"""Capabilities are probed once; a missing one skips with its reason, unless FMDEPLOY_REQUIRE names it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
# One thread a process: tests share two cores, and oversubscribed thread pools are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A busy machine is slow to draw and to answer; neither says anything about the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def _no_trt() -> str | None:
    return None if importlib.util.find_spec("tensorrt") else "the package tensorrt is not installed"


def _no_jetson() -> str | None:
    return None if Path("/etc/nv_tegra_release").exists() else "not a Jetson"


def _no_docker() -> str | None:
    import docker

    where = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if not os.environ.get("FMDEPLOY_BASE"):
        return "no base image in FMDEPLOY_BASE: `make test-container` makes one"
    try:
        client = docker.from_env(timeout=10)
        client.close()
    except docker.errors.DockerException:
        return f"no Docker engine answers at {where}"
    return None


PROBES: dict[str, Callable[[], str | None]] = {
    "gpu": _no_gpu, "trt": _no_trt, "jetson": _no_jetson, "container": _no_docker,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what the code says now")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    required = set(filter(None, os.environ.get("FMDEPLOY_REQUIRE", "").split(",")))
    reasons = {name: probe() for name, probe in PROBES.items() if any(i.get_closest_marker(name) for i in items)}
    if absent := [f"{name}: {reasons[name]}" for name in sorted(required) if reasons.get(name)]:
        raise pytest.UsageError(f"FMDEPLOY_REQUIRE asks for what is not here: {'; '.join(absent)}")
    for item in items:
        for name, reason in reasons.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line a row of the fault matrices: the largest detection time of its tests.

    Here and not in tests/faults: the process that prints the summary collects no tests, so it reads no inner conftest.
    """
    worst: dict[str, tuple[float, str]] = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in getattr(report, "user_properties", []):
            if name == "fdti" and value[1] >= worst.get(value[0], (-1.0, ""))[0]:
                worst[value[0]] = value[1], value[2]
    if worst:
        terminalreporter.section("measured fault detection time intervals (FDTI)")
    for row in sorted(worst, key=lambda text: (text[0], int(text[1:]))):
        terminalreporter.write_line(f"{row:4} {worst[row][0]:10.3f} ms  {worst[row][1]}")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be rewritten."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT
