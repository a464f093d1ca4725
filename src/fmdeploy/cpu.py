"""Which 8-bit multiply this CPU has: without VNNI, x86 adds pairs of U8S8 products in 16 bits and saturates."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Isa:
    """A machine and whether 8-bit products are added without saturation on it."""

    machine: str
    exact_int8: bool


def this_cpu(cpuinfo: Path = CPUINFO) -> Isa:
    """Describe this machine; where /proc/cpuinfo does not say, an x86 CPU is taken to saturate."""
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        return Isa(machine, True)
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return Isa(machine, False)
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return Isa(machine, "avx512_vnni" in flags or "avx_vnni" in flags)
