"""Memory as the kernel counts it. On a Jetson, CPU and GPU take from one memory, and no single number has all of it.

`MemTotal − MemAvailable` is what everybody has taken, `NvMapMemUsed` what the GPU and the engines share (Orin; a Thor
has no such line), `VmHWM` the largest resident set of a process, and PSS its fair share of what it shares with others.
CUDA allocations are in the first two and not in the last two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fmdeploy.jetson.reading import read_text

MEMINFO, VMSTAT = Path("proc/meminfo"), Path("proc/vmstat")
KIB_PER_MIB = 1024


@dataclass(frozen=True)
class Memory:
    """Memory of the machine at one moment, in MiB; None where the kernel does not say."""

    total_mib: float | None = None
    available_mib: float | None = None
    nvmap_mib: float | None = None
    swap_total_mib: float | None = None
    swap_free_mib: float | None = None
    swapped_in_pages: int | None = None

    @property
    def used_mib(self) -> float | None:
        """What processes, the kernel and the GPU have taken and cannot be had back at once."""
        if self.total_mib is None or self.available_mib is None:
            return None
        return self.total_mib - self.available_mib


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of one process, in MiB; None where the kernel does not say."""

    rss_mib: float | None = None
    peak_mib: float | None = None
    pss_mib: float | None = None


def read_memory(root: Path = Path("/")) -> Memory:
    """Read /proc/meminfo and /proc/vmstat."""
    table = table_of(read_text(root / MEMINFO) or "")
    swapped = re.search(r"^pswpin (\d{1,18})$", read_text(root / VMSTAT) or "", re.MULTILINE)
    return Memory(
        total_mib=table.get("MemTotal"),
        available_mib=table.get("MemAvailable"),
        nvmap_mib=table.get("NvMapMemUsed"),
        swap_total_mib=table.get("SwapTotal"),
        swap_free_mib=table.get("SwapFree"),
        swapped_in_pages=int(swapped[1]) if swapped else None,
    )


def read_process(pid: int, root: Path = Path("/")) -> ProcessMemory:
    """Read VmRSS and VmHWM of a process, and its PSS, which takes the kernel a walk through all its pages."""
    status = table_of(read_text(root / f"proc/{pid}/status") or "")
    shares = table_of(read_text(root / f"proc/{pid}/smaps_rollup") or "")
    return ProcessMemory(status.get("VmRSS"), status.get("VmHWM"), shares.get("Pss"))


def table_of(text: str) -> dict[str, float]:
    """Return `Name: 123 kB` lines as MiB; other lines are passed over."""
    found = re.findall(r"^(\w+):\s+(\d{1,15}) kB$", text, re.MULTILINE)
    return {name: int(kib) / KIB_PER_MIB for name, kib in found}
