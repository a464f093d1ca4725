"""`fmdeploy container run`: start the runtime without rights, and wait until it is ready."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath, RunOnly
from fmdeploy.errors import ArtifactError, GateError, InputError, MissingError
from fmdeploy.jetson.container.engine import connect, runtimes_of
from fmdeploy.jetson.container.host import look_at
from fmdeploy.jetson.container.options import SOCKET, Settings, run_options
from fmdeploy.optional import require

POLL_S = 0.25
LAST_LINES = 5


class RunConfig(Settings):
    """Options of `fmdeploy container run`."""

    root: InputPath = Field(default=Path("/"), description="Read groups and release of the host below this folder")
    wait: Annotated[bool, RunOnly()] = Field(default=True, description="Wait until the container is healthy")


@command(RunConfig)
def run(config: RunConfig) -> Outcome:
    """Serve a bundle from a container: read-only, without capabilities, network or root, on a Unix socket."""
    client = connect()
    check_bundle(config.bundle)
    options = run_options(config, look_at(config.root, runtimes_of(client)))
    prepare_sockets(Path(config.sockets), config.user)
    container = start(client, options)
    health = wait_healthy(container, config.start_s) if config.wait else "starting"
    socket = str(Path(config.sockets, Path(SOCKET).name))
    data = {"id": container.id, "name": config.name, "image": config.image, "socket": socket, "health": health,
            "user": config.user, "groups": options["group_add"], "runtime": options.get("runtime")}
    return Outcome((f"container {config.name} is {health}, at {socket}",), data)


def check_bundle(path: Path) -> None:
    """Refuse what is not there; its content is verified inside.

    Raises:
        ArtifactError: there is no bundle.
    """
    if not (path / "manifest.json").is_file():
        raise ArtifactError("is not a BUNDLE: it holds no manifest.json", where=path,
                            fix="Make one with fmdeploy export")


def prepare_sockets(folder: Path, user: str) -> None:
    """Make the folder of the socket, owned by the container's user.

    Raises:
        MissingError: only root can make it, or make it writable.
    """
    uid, gid = map(int, user.split(":"))
    fix = f"Run: sudo install -d -o {uid} -g {gid} -m 0750 {folder}"
    try:
        if not folder.exists():
            folder.mkdir(parents=True)
            os.chown(folder, uid, gid)
            folder.chmod(0o750)
    except PermissionError as error:
        raise MissingError("the folder of the socket cannot be made", where=folder, fix=fix) from error
    info = folder.stat()
    as_owner = info.st_uid == uid and info.st_mode & stat.S_IWUSR
    as_group = info.st_gid == gid and info.st_mode & stat.S_IWGRP
    if not (as_owner or as_group or info.st_mode & stat.S_IWOTH):
        raise MissingError("the container's user may not write into the folder of the socket", where=folder,
                           expected=f"owner {user}", found=f"{info.st_uid}:{info.st_gid}", fix=fix)


def start(client: Any, options: dict[str, Any]) -> Any:
    """Create and start a container.

    Raises:
        MissingError: the image is not there.
        InputError: the name is taken, or the engine refuses an option.
    """
    docker = require("docker")
    mounts = [docker.types.Mount(m["target"], m["source"], type=m["type"], read_only=m["read_only"])
              for m in options["mounts"]]
    try:
        client.images.get(options["image"])
        container = client.containers.create(**{**options, "mounts": mounts})
    except docker.errors.ImageNotFound as error:
        raise MissingError("no such image", where=options["image"],
                           fix="Make it with: fmdeploy container build") from error
    except docker.errors.APIError as error:
        fix = f"Remove it: docker rm --force {options['name']}" if error.status_code == 409 else None
        raise InputError(f"the engine refuses: {error.explanation or error}", where=options["name"], fix=fix) from error
    try:
        container.start()
    except docker.errors.APIError as error:
        container.remove(force=True)
        raise InputError(f"the engine does not start it: {error.explanation or error}",
                         where=options["name"]) from error
    return container


def wait_healthy(container: Any, limit_s: float) -> str:
    """Wait until the health check passes.

    Raises:
        GateError: it does not in time, or the container ended; the text holds its last lines.
    """
    until = time.monotonic() + limit_s
    fix = f"Read: docker logs {container.name}; then remove it: docker rm --force {container.name}"
    while time.monotonic() < until:
        container.reload()
        state = container.attrs["State"]
        if state.get("Health", {}).get("Status") == "healthy":
            return "healthy"
        if state["Status"] in ("exited", "dead", "restarting") or container.attrs["RestartCount"]:
            container.stop()  # what does not start is not to be tried again
            raise GateError(f"the container ended: {last_lines(container)}", where=container.name, fix=fix)
        time.sleep(POLL_S)
    container.stop()
    raise GateError(f"not healthy after {limit_s:.0f} s: {last_lines(container)}", where=container.name, fix=fix)


def last_lines(container: Any) -> str:
    """What it said last: its error where there is one."""
    lines = [line for line in container.logs(tail=200).decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("fmdeploy: ") and "this is a bug" not in line]
    return errors[-1] if errors else " | ".join(lines[-LAST_LINES:])
