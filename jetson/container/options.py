"""From options to what the engine is asked for: a pure function, so that every restriction can be read and tested."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fmdeploy.config import InputPath, Positional, RunOnly, StageConfig
from fmdeploy.errors import InputError, MissingError
from fmdeploy.jetson.container.host import Host
from fmdeploy.plainfield import FOLDER, ImageName, PlainFolder, PlainName, UserName, plain_field

BUNDLE = "/bundle"
SOCKETS = "/run/fmdeploy"
SOCKET = f"{SOCKETS}/serve.sock"
ENGINES = "/var/lib/fmdeploy/engines"
KEY = "/key.pub"
SECOND_NS = 1_000_000_000
NVIDIA = {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}


class Settings(StageConfig):
    """What a container needs to know, whoever starts it: this program, compose or systemd."""

    bundle: Annotated[InputPath, Positional()] = Field(description="Folder of a BUNDLE; mounted read-only")
    jetpack: Literal["6", "7"] = Field(default="6", description="JetPack of the device: names the default image")
    tag: ImageName | None = Field(default=None, description="Image to run; default: what `container build` made")
    name: PlainName = Field(default="fmdeploy", description="Name of the container")
    sockets: PlainFolder = Field(default=SOCKETS, description="Folder of the host in which serve.sock appears")
    engines: PlainFolder | PlainName = Field(default="fmdeploy-engines",
                                             description="Volume, or folder of the host, that keeps TensorRT engines")
    user: UserName = Field(default="10001:10001", description="Numeric user and group inside the container; not root")
    groups: tuple[int, ...] = Field(default=(), description="Numeric groups of the GPU's devices; default: found here")
    runtime: PlainName | None = Field(default=None, description="Runtime of the engine; default: nvidia on a Jetson")
    model: PlainName | None = Field(default=None, description="Name of the model in the URLs; default: bundle")
    key: InputPath | None = Field(default=None, description="Public key: serve only a bundle that it signed")
    pids: int = Field(default=256, ge=16, le=65536, description="Limit of processes and threads")
    shm_mib: int = Field(default=256, ge=16, le=65536, description="Shared memory for frames, MiB")
    tmp_mib: int = Field(default=64, ge=1, le=65536, description="Size of /tmp, the only writable folder, MiB")
    start_s: Annotated[int, RunOnly()] = Field(default=900, ge=1, le=7200,
                                               description="Time for the first start, which builds engines, seconds")
    health_s: Annotated[int, RunOnly()] = Field(default=10, ge=1, le=600,
                                                description="Time for one health check, seconds")

    @property
    def image(self) -> str:
        """The image to run."""
        return self.tag or default_tag(self.jetpack)


def default_tag(jetpack: str) -> str:
    """The name of the image for a JetPack."""
    return f"fmdeploy-runtime:jp{jetpack}"


def run_options(settings: Settings, host: Host) -> dict[str, Any]:
    """Arguments of `docker.models.containers.ContainerCollection.create`, mounts as plain dictionaries.

    Raises:
        InputError: the user is root, or a path has characters that mean something in a generated file.
        MissingError: this is a Jetson whose engine lacks the runtime nvidia.
    """
    if int(settings.user.split(":")[0]) == 0:
        raise InputError("the container shall not run as root", where="--user", found=settings.user,
                         fix="Give a numeric user other than 0, such as 10001:10001")
    runtime = choose_runtime(settings, host)
    return {
        "image": settings.image,
        "name": settings.name,
        "command": command(settings),
        "user": settings.user,
        "group_add": [str(number) for number in settings.groups or host.groups],
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "network_mode": "none",
        "pids_limit": settings.pids,
        "shm_size": f"{settings.shm_mib}m",
        "tmpfs": {"/tmp": f"rw,nosuid,nodev,noexec,size={settings.tmp_mib}m,mode=1777"},
        "mounts": mounts(settings, host),
        "environment": dict(NVIDIA) if runtime == "nvidia" else {},
        "healthcheck": healthcheck(settings),
        "restart_policy": {"Name": "on-failure", "MaximumRetryCount": 3},
        "stop_signal": "SIGTERM",
        **({"runtime": runtime} if runtime else {}),
    }


def choose_runtime(settings: Settings, host: Host) -> str | None:
    """The runtime of the engine. Never `--gpus`: on a Jetson the engine refuses it, and CDI is not needed.

    Raises:
        MissingError: the engine does not know it; without it CUDA would be absent inside, and only a slow tier left.
    """
    wanted = settings.runtime or ("nvidia" if host.is_jetson else None)
    if wanted and wanted not in host.runtimes:
        fix = "Run: sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
        raise MissingError(f"the Docker engine has no runtime {wanted}", found=", ".join(host.runtimes), fix=fix)
    return wanted


def command(settings: Settings) -> list[str]:
    """Arguments of fmdeploy inside."""
    named = ["--name", settings.model] if settings.model else []
    signed = ["--require-signature", KEY] if settings.key else []
    return ["serve", BUNDLE, "--unix", SOCKET, "--engines", ENGINES, *named, *signed]


def healthcheck(settings: Settings) -> dict[str, Any]:
    """How the engine asks for health; until `start_s` is over a failure does not count, as the first start builds."""
    return {"test": ["CMD", "python3", "-m", "fmdeploy.jetson.container.healthcheck", SOCKET],
            "interval": 5 * SECOND_NS, "timeout": settings.health_s * SECOND_NS, "retries": 3,
            "start_period": settings.start_s * SECOND_NS}


def mounts(settings: Settings, host: Host) -> list[dict[str, Any]]:
    """Bundle and the board's files read-only, sockets and engines writable, nothing else: above all no docker.sock."""
    found = [
        bind(settings.bundle, BUNDLE),
        bind(Path(settings.sockets), SOCKETS, read_only=False),
        {"type": "bind" if settings.engines.startswith("/") else "volume", "source": settings.engines,
         "target": ENGINES, "read_only": False},
    ]
    found += [bind(source, target) for source, target in host.files]
    if settings.key:
        found.append(bind(settings.key, KEY))
    return found


def bind(source: Path, target: str, *, read_only: bool = True) -> dict[str, Any]:
    """A mount of a file or folder of the host."""
    path = plain_field(str(source.absolute()), where=f"the path that becomes {target} inside", pattern=FOLDER)
    return {"type": "bind", "source": path, "target": target, "read_only": read_only}
