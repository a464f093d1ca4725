"""Options of `fmdeploy serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from fmdeploy.config import InputPath, OutputPath, Positional, RequiredKey, RunOnly, StageConfig
from fmdeploy.runtime.tiers import TIERS

DEFAULT_HTTP = "127.0.0.1:8000"


class ServeConfig(StageConfig):
    """Options of `fmdeploy serve`."""

    bundle: Annotated[InputPath, Positional()] = Field(description="Folder of a BUNDLE, or a link to one")
    http: str = Field(default="", description=f"HOST:PORT; port 0 takes a free one. Default: {DEFAULT_HTTP}")
    unix: OutputPath | None = Field(default=None, description="Listen on this Unix socket instead")
    name: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]{0,64}$",
                      description="Name of the model in the URLs. Default: the name of the bundle's folder")
    tiers: tuple[str, ...] = Field(default=TIERS, min_length=1, description="Tiers to try, best first")
    threads: Annotated[int, RunOnly()] = Field(default=1, ge=1, le=256, description="Threads inside one run")
    deadline_ms: float | None = Field(default=None, gt=0, description="Age at which a result is discarded")
    hard_deadline_ms: float = Field(default=1000.0, gt=0,
                                    description="Time after which a frame is given up and its worker killed")
    queue: int = Field(default=4, ge=1, le=1024, description="Frames that may wait; a newer one drops the oldest")
    body_limit_mib: float | None = Field(default=None, gt=0, le=4096,
                                         description="Largest request. Default: 8 times the inputs and 64 KiB")
    connections: int = Field(default=64, ge=1, le=4096, description="Connections at a time")
    read_timeout_s: float = Field(default=10.0, gt=0, description="Time a client has to send one whole request")
    grace_s: float = Field(default=5.0, gt=0, description="Time that requests have to finish after SIGTERM")
    check_s: float = Field(default=30.0, gt=0, description="Interval at which the files on disk are checked")
    supervisor: bool = Field(default=True, description="Run the model in a worker process under supervision")
    standby: bool = Field(default=True, description="Keep the next tier loaded; costs its memory")
    engines: InputPath | None = Field(default=None, description="Folder of ENGINEs, for the TensorRT tiers")
    build_missing: bool = Field(default=True,
                                description="Build an ENGINE there that is missing or does not fit; takes minutes")
    require_signature: RequiredKey = None
    allow_remote: bool = Field(default=False, description="Allow an address that other machines can reach")
    allow_reload: bool = Field(default=False, description="Let clients ask for a reload, as SIGHUP does")


def model_name(config: ServeConfig) -> str:
    """Return the name the model is served under: the one given, or the folder's with odd characters replaced."""
    folder = Path(config.bundle).absolute().name
    plain = "".join(char if char.isascii() and (char.isalnum() or char in "_.-") else "_" for char in folder)
    return config.name or plain[:64] or "model"
