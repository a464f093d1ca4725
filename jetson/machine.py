"""What an engine is bound to besides ONNX file and GPU: L4T release and power mode. Read from files, never guessed."""

from __future__ import annotations

import re
from pathlib import Path

RELEASE = Path("etc/nv_tegra_release")
PACKAGES = Path("var/lib/dpkg/status")
POWER_STATUS = Path("var/lib/nvpmodel/status")
POWER_MODES = Path("etc/nvpmodel.conf")
MEMINFO = Path("proc/meminfo")


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


def available_mib(root: Path = Path("/")) -> int | None:
    """Memory that processes can still take, from /proc/meminfo; on a Jetson the GPU takes from it, too."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / MEMINFO), re.MULTILINE)
    return int(found[1]) // 1024 if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
