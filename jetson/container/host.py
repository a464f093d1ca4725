"""What the host gives to a container: numeric groups of the GPU's device files, release and power mode of the board."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GROUPS = ("video", "render")
GROUP_FILE = Path("etc/group")
DEVICES = ("dev/nvmap", "dev/nvhost-ctrl", "dev/dri/renderD*")
RELEASE = "etc/nv_tegra_release"
# An engine belongs to a release and a power mode (jetson/machine.py), which a container cannot see by itself.
BOARD_FILES = (RELEASE, "etc/nvpmodel.conf", "var/lib/nvpmodel")


@dataclass(frozen=True)
class Host:
    """The machine that runs the container."""

    groups: tuple[int, ...] = ()
    """Numeric, because the names inside the image may have other numbers."""
    files: tuple[tuple[Path, str], ...] = ()
    """Files that say which board this is: where they lie, and where they belong inside."""
    runtimes: tuple[str, ...] = ("runc",)
    """Runtimes that the Docker engine knows."""

    @property
    def is_jetson(self) -> bool:
        """Whether this is a Jetson."""
        return any(target == f"/{RELEASE}" for _, target in self.files)


def look_at(root: Path, runtimes: tuple[str, ...]) -> Host:
    """Read the host below `root`."""
    groups = sorted({*named_groups(root), *device_groups(root)})
    files = tuple((root / name, f"/{name}") for name in BOARD_FILES if (root / name).exists())
    return Host(tuple(groups), files, runtimes)


def named_groups(root: Path) -> Iterator[int]:
    """Numbers of the groups video and render."""
    file = root / GROUP_FILE
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        fields = line.split(":")
        if len(fields) >= 3 and fields[0] in GROUPS and fields[2].isdigit():
            yield int(fields[2])


def device_groups(root: Path) -> Iterator[int]:
    """Groups that own the GPU's device files; group 0 is left out, a container shall not be in root's group."""
    for pattern in DEVICES:
        for path in root.glob(pattern):
            if group := path.stat().st_gid:
                yield group
