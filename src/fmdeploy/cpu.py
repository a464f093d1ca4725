"""Which 8-bit multiply this CPU has: without VNNI, x86 adds pairs of U8S8 products in 16 bits and saturates."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
X86 = ("x86_64", "AMD64")
# Names in /proc/cpuinfo, the fastest 8-bit multiply first. VNNI sums four products in 32 bits; dotprod and i8mm, too.
X86_FEATURES = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512bw", "avx2")
ARM_FEATURES = ("i8mm", "asimddp")
EXACT_ON_X86 = ("amx_int8", "avx512_vnni", "avx_vnni")


@dataclass(frozen=True)
class Isa:
    """A machine and whether 8-bit products are added without saturation on it."""

    machine: str
    exact_int8: bool
    features: tuple[str, ...] = ()
    """Of those that decide how 8 bits are multiplied, the ones that this CPU has, fastest first."""

    def __str__(self) -> str:
        how = "exact" if self.exact_int8 else "saturating"
        return f"{self.machine}, {', '.join(self.features) or 'no known 8-bit instructions'}: {how} 8-bit products"


def this_cpu(cpuinfo: Path = CPUINFO) -> Isa:
    """Describe this machine; where /proc/cpuinfo does not say, an x86 CPU is taken to saturate.

    ARM is exact with or without dotprod: its older multiply (SMLAL) widens to 16 bits and adds in 32.
    """
    machine = platform.machine()
    x86 = machine in X86
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return Isa(machine, not x86)
    title = "flags" if x86 else "Features"
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(title)), [])
    found = tuple(name for name in (X86_FEATURES if x86 else ARM_FEATURES) if name in flags)
    return Isa(machine, not x86 or any(name in EXACT_ON_X86 for name in found), found)
