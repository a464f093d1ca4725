"""The Docker engine, through the Docker SDK; its errors become one line with a fix."""

from __future__ import annotations

import os
from typing import Any

from fmdeploy.errors import MissingError
from fmdeploy.optional import require

SOCKET = "unix:///var/run/docker.sock"
TIMEOUT_S = 600


def connect() -> Any:
    """A client of the engine that DOCKER_HOST names, else of the local one.

    Raises:
        MissingError: the package is missing, or no engine answers.
    """
    docker = require("docker")
    where = os.environ.get("DOCKER_HOST", SOCKET)
    try:
        client = docker.from_env(timeout=TIMEOUT_S)
        client.ping()
    except docker.errors.DockerException as error:
        fix = "Start it (sudo systemctl start docker), or set DOCKER_HOST"
        if "Permission denied" in str(error):
            fix = "Run this as root or as a member of the group docker"
        raise MissingError("the Docker engine does not answer", where=where, found=_first_line(error),
                           fix=fix) from error
    return client


def runtimes_of(client: Any) -> tuple[str, ...]:
    """Names of the runtimes that the engine can start containers with."""
    return tuple(sorted(client.info().get("Runtimes", {})))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
