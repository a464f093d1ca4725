"""`fmdeploy container build`: the runtime image, from a base image and a wheelhouse."""

from __future__ import annotations

import platform
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fmdeploy import __version__
from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath, StageConfig
from fmdeploy.errors import InputError, MissingError
from fmdeploy.jetson.container.engine import connect
from fmdeploy.jetson.container.options import default_tag
from fmdeploy.jetson.container.wheels import copy_wheels, gather
from fmdeploy.optional import require
from fmdeploy.plainfield import ImageName

RECIPES = Path(__file__).resolve().parents[1]
PYTHONS = {"6": "3.10", "7": "3.12"}
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
MEBI = 1 << 20
LAST_LINES = 6


class BuildConfig(StageConfig):
    """Options of `fmdeploy container build`."""

    jetpack: Literal["6", "7"] = Field(default="6", description="JetPack of the device: 6, or 7 for 7.2 and newer")
    base: ImageName | None = Field(default=None, description="Base image; default: the one in the Dockerfile")
    tag: ImageName | None = Field(default=None, description="Name of the new image; default: fmdeploy-runtime:jp6")
    python: Literal["3.10", "3.11", "3.12", "3.13"] | None = Field(
        default=None, description="Python of the base image; default: the JetPack's")
    arch: Literal["arm64", "amd64"] | None = Field(default=None, description="Architecture; default: this machine's")
    wheels: InputPath | None = Field(default=None, description="Folder of ready wheels; default: fetched with pip")
    source: InputPath | None = Field(default=None, description="Checkout of fmdeploy; default: the one that runs")
    constraints: InputPath | None = Field(
        default=None, description="Constraints file of pip to choose other versions; default: the locked wheels")


@command(BuildConfig)
def build(config: BuildConfig) -> Outcome:
    """Build the runtime image for a Jetson. Wheels are fetched first; no step of the build needs a network or a GPU."""
    client = connect()
    arch = config.arch or ARCHITECTURES.get(platform.machine(), platform.machine())
    base = config.base or default_base(config.jetpack)
    require_base(client, base, arch)
    with tempfile.TemporaryDirectory(prefix="fmdeploy-image-") as scratch:
        context = Path(scratch)
        (context / "wheels").mkdir()
        if config.wheels:
            copy_wheels(config.wheels, context / "wheels")
        else:
            gather(context / "wheels", source=config.source, python=config.python or PYTHONS[config.jetpack], arch=arch,
                   constraints=config.constraints)
        shutil.copy2(RECIPES / f"Dockerfile.jp{config.jetpack}", context / "Dockerfile")
        sizes = {wheel.name: wheel.stat().st_size for wheel in sorted((context / "wheels").glob("*.whl"))}
        image = build_image(client, context, **build_options(config))
    data = {"image": image.id, "tag": config.tag or default_tag(config.jetpack), "base": base, "arch": arch,
            "size_mib": image.attrs["Size"] / MEBI, "wheels_mib": sum(sizes.values()) / MEBI, "wheels": sizes}
    return Outcome((f"image {data['tag']} for {arch}: {data['size_mib']:.0f} MiB",
                    f"  {len(sizes)} wheels, {data['wheels_mib']:.1f} MiB, installed without network"), data)


def default_base(jetpack: str) -> str:
    """The base image that the Dockerfile names."""
    recipe = (RECIPES / f"Dockerfile.jp{jetpack}").read_text(encoding="utf-8")
    found = re.search(r"^ARG BASE=(\S+)$", recipe, re.MULTILINE)
    assert found, "the Dockerfile names a base"
    return found[1]


def require_base(client: Any, base: str, arch: str) -> None:
    """Have the base image on the engine, pulled where it is not.

    Raises:
        MissingError: it is neither here nor reachable.
        InputError: the one that is here is for another architecture.
    """
    docker = require("docker")
    try:
        image = client.images.get(base)
    except docker.errors.ImageNotFound:
        try:
            image = client.images.pull(base, platform=f"linux/{arch}")
        except docker.errors.APIError as error:
            raise MissingError(f"the base image cannot be pulled: {error.explanation or error}", where=base,
                               fix="Pull it where its registry is reachable, or give another --base") from error
    if image.attrs["Architecture"] != arch:
        raise InputError("the base image is for another architecture", where=base, expected=arch,
                         found=image.attrs["Architecture"], fix="Give --arch, or pull the other one with --platform")


def build_options(config: BuildConfig) -> dict[str, Any]:
    """Arguments of the engine's build call besides the context.

    No platform: the base is on the engine by now, and decides.
    """
    return {
        "tag": config.tag or default_tag(config.jetpack),
        "buildargs": {"BASE": config.base} if config.base else {},
        "network_mode": "none",
        "labels": {"org.opencontainers.image.title": "fmdeploy runtime",
                   "org.opencontainers.image.version": __version__},
        "rm": True,
        "forcerm": True,
    }


def build_image(client: Any, context: Path, **options: Any) -> Any:
    """Build, and return the image.

    Raises:
        InputError: a step fails; the text holds the last lines of the log.
    """
    docker = require("docker")
    try:
        image, _ = client.images.build(path=str(context), **options)
    except docker.errors.BuildError as error:
        log = [line for entry in error.build_log for line in str(entry.get("stream", "")).splitlines() if line.strip()]
        raise InputError(f"the image does not build: {' | '.join([*log[-LAST_LINES:], error.msg])}",
                         where=options["tag"], fix="Check --base, --python and --arch against each other") from error
    except docker.errors.APIError as error:
        raise InputError(f"the engine refuses to build: {error.explanation or error}", where=options["tag"]) from error
    return image
