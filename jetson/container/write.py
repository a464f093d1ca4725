"""`fmdeploy container write`: files with which a host keeps the runtime running, for its own numbers and paths."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath, OutputPath
from fmdeploy.files import write_atomically
from fmdeploy.jetson.container.host import Host, look_at
from fmdeploy.jetson.container.options import Settings, run_options
from fmdeploy.jetson.container.render import compose, container_unit, process_unit
from fmdeploy.plainfield import PlainFolder


class WriteConfig(Settings):
    """Options of `fmdeploy container write`."""

    out: OutputPath = Field(description="Folder to write into; files of the same names are replaced")
    program: PlainFolder = Field(default="/opt/fmdeploy/bin/fmdeploy",
                                 description="fmdeploy on the host, for the unit without a container")
    root: InputPath = Field(default=Path("/"), description="Read groups and release of the host below this folder")


@command(WriteConfig)
def write(config: WriteConfig) -> Outcome:
    """Write compose.yaml, a unit that runs the container and one that runs the program itself, for this host."""
    found = look_at(config.root, ("runc", "nvidia"))
    config.out.mkdir(parents=True, exist_ok=True)
    files = render(config, found, config.program)
    for name, text in files.items():
        write_atomically(config.out / name, text)
    return Outcome(tuple(str(config.out / name) for name in files), {"out": str(config.out), "files": sorted(files)})


def render(settings: Settings, host: Host, program: str) -> dict[str, str]:
    """Name → text of every file."""
    options = run_options(settings, host)
    return {"compose.yaml": compose(options), "fmdeploy-container.service": container_unit(settings, options),
            "fmdeploy.service": process_unit(settings, program)}
