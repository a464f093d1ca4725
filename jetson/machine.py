"""What an engine is bound to besides ONNX file and GPU: L4T release and power mode. Read from files, never guessed."""

from __future__ import annotations

import re
from pathlib import Path

from fmdeploy.jetson.memory import MEMINFO, table_of
from fmdeploy.jetson.reading import read_text

MAX_BYTES = 1 << 26  # the list of all packages of a board is some MiB
RELEASE = Path("etc/nv_tegra_release")
PACKAGES = Path("var/lib/dpkg/status")
POWER_STATUS = Path("var/lib/nvpmodel/status")
POWER_MODES = Path("etc/nvpmodel.conf")
KERNEL = Path("proc/sys/kernel/osrelease")
MODEL = Path("proc/device-tree/model")
MODEL_IN_SYSFS = Path("sys/firmware/devicetree/base/model")
COMPATIBLE = Path("proc/device-tree/compatible")
SOC_FAMILY = Path("sys/devices/soc0/family")


def l4t_release(root: Path = Path("/")) -> str | None:
    """Release of Jetson Linux from /etc/nv_tegra_release, else from the version of the package nvidia-l4t-core."""
    first = _read(root / RELEASE).partition("\n")[0]
    if found := re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", first):
        return f"{found[1]}.{found[2]}"
    block = re.search(r"^Package: nvidia-l4t-core\n(?:.+\n)*?Version: ([\d.]+)", _read(root / PACKAGES), re.MULTILINE)
    return block[1] if block else None


def power_mode(root: Path = Path("/")) -> str | None:
    """Name of the power mode that was set last. Numbers differ from board to board, so the table of names is read."""
    found = re.search(r"pmode:(\d+)", _read(root / POWER_STATUS))
    if not found:
        return None
    number = int(found[1])
    names = re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", _read(root / POWER_MODES))
    return next((name for text, name in names if int(text) == number), f"id {number}")


def kernel(root: Path = Path("/")) -> str:
    """Release of the running kernel, such as `5.15.148-tegra`; empty when unknown."""
    return _read(root / KERNEL).strip()


def board_model(root: Path = Path("/")) -> str | None:
    """Name of the board from the device tree; None in most containers, where it is masked."""
    for path in (MODEL, MODEL_IN_SYSFS):
        if found := _read(root / path).strip("\0 \n"):
            return found
    return None


def is_jetson(root: Path = Path("/")) -> bool:
    """Whether this is a Jetson, also in a container, where only the kernel's own files tell."""
    return ("tegra" in kernel(root) or bool(_read(root / RELEASE)) or "nvidia,tegra" in _read(root / COMPATIBLE)
            or _read(root / SOC_FAMILY).strip() == "Tegra" or "NvMapMemUsed" in _read(root / MEMINFO))


def available_mib(root: Path = Path("/")) -> int | None:
    """Memory that processes can still take, from /proc/meminfo; on a Jetson the GPU takes from it, too."""
    found = table_of(_read(root / MEMINFO)).get("MemAvailable")
    return int(found) if found is not None else None


def _read(path: Path) -> str:
    return read_text(path, MAX_BYTES) or ""
