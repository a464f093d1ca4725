"""One line of `tegrastats` as typed values.

What a line does not say is None, never 0: the load of a GPU whose clock alone is printed is unknown. Formats differ by
release (R32 to R39), by board and by user: `EMC_FREQ` and GPU clocks are there for root only, cores may be `off`, dead
sensors read −256 °C, and a line may be cut. Tokens that nobody knows are passed over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from fmdeploy.errors import DataError
from fmdeploy.jetson.reading import number

NO_SENSOR_C = -200.0  # values at or below stand for a sensor that is not powered
MAX_CHARS = 16_384

_NUM = r"\d{1,9}"
_RAM = re.compile(rf"\bRAM ({_NUM})/({_NUM})MB(?: \(lfb ({_NUM})x({_NUM})(k|M)B\))?")
_SWAP = re.compile(rf"\bSWAP ({_NUM})/({_NUM})MB(?: \(cached ({_NUM})MB\))?")
_CPUS = re.compile(r"\bCPU \[([^\]]*)\]")
_CORE = re.compile(rf"({_NUM})%(?:@({_NUM}))?")
_EMC = re.compile(rf"\bEMC_FREQ (?:({_NUM})%)?(?:@({_NUM}))?(?!\S)")
_GPU = re.compile(rf"\bGR3D_FREQ (?:({_NUM})%)?(?:@(?:\[((?:{_NUM},)*{_NUM})\]|({_NUM})))?(?!\S)")
_CELSIUS = r"-?\d{1,6}(?:[.,]\d{1,6})?"
_HEAT = re.compile(rf"(?<!\S)([A-Za-z][\w.-]*)@({_CELSIUS})C(?:/({_CELSIUS})C)?(?!\S)")
_RAIL = re.compile(rf"(?<!\S)([A-Z][A-Z0-9_]*) ({_NUM})(?:mW)?/({_NUM})(?:mW)?(?:/({_NUM})(?:mW)?)?(?!\S)")
_ENGINE = re.compile(rf"(?<!\S)([A-Z][A-Z0-9]*)(?:_FREQ)? (off|(?:({_NUM})%)?(?:@({_NUM}))?|({_NUM}))(?!\S)")
_DATE = re.compile(r"(\d\d-\d\d-\d{4} \d\d:\d\d:\d\d) ")
_NO_ENGINE = ("RAM", "IRAM", "SWAP", "CPU", "EMC", "GR3D", "MTS")


@dataclass(frozen=True)
class Core:
    """One CPU core. An offline core has neither load nor clock."""

    online: bool
    load_percent: int | None = None
    clock_mhz: int | None = None


@dataclass(frozen=True)
class Rail:
    """Power of one rail."""

    now_mw: int
    average_mw: int
    max_mw: int | None = None


@dataclass(frozen=True)
class Engine:
    """A fixed-function engine; powered engines may say a load, a clock, or neither."""

    powered: bool
    load_percent: int | None = None
    clock_mhz: int | None = None


@dataclass(frozen=True)
class Sample:
    """One line.

    Attributes:
        ram_used_mib: Memory in use, of `ram_total_mib`.
        ram_total_mib: Memory of the board.
        largest_free_kib: Size of the largest free block.
        swap_used_mib: Swap in use; None where the line says nothing about swap.
        swap_total_mib: Swap there is.
        cores: One entry a core; empty where the line does not list them.
        emc_load_percent: Load of the memory controller; root only.
        emc_clock_mhz: Its clock; root only.
        gpu_load_percent: None when unknown.
        gpu_clocks_mhz: One clock a GPU cluster; empty when unknown, zeros where the GPU is without power.
        temperatures_c: Sensor, in lower case, to temperature; sensors without power are left out.
        rails: Name to power.
        engines: Name, without `_FREQ`, to its state.
        date: Local date and time at the head of the line, since R35.
    """

    ram_used_mib: int
    ram_total_mib: int
    largest_free_kib: int | None = None
    swap_used_mib: int | None = None
    swap_total_mib: int | None = None
    cores: tuple[Core, ...] = ()
    emc_load_percent: int | None = None
    emc_clock_mhz: int | None = None
    gpu_load_percent: int | None = None
    gpu_clocks_mhz: tuple[int, ...] = ()
    temperatures_c: dict[str, float] = field(default_factory=dict)
    rails: dict[str, Rail] = field(default_factory=dict)
    engines: dict[str, Engine] = field(default_factory=dict)
    date: str | None = None


def parse_line(line: str, *, complete: bool = True) -> Sample:
    """Parse one line.

    Args:
        line: Text of the line.
        complete: Whether its end was seen. The last word of a line that was cut may be half a number, so it is dropped.

    Raises:
        DataError: It does not begin as a line of tegrastats does: there is no `RAM a/bMB` in it.
    """
    text = line[:MAX_CHARS]
    if not complete or len(line) > MAX_CHARS:
        text = text.rpartition(" ")[0]
    ram = _RAM.search(text)
    if ram is None:
        raise DataError("is no line of tegrastats", expected="RAM used/totalMB", found=repr(line[:60]))
    swap, gpu, emc, date = _SWAP.search(text), _GPU.search(text), _EMC.search(text), _DATE.match(text)
    return Sample(
        ram_used_mib=int(ram[1]),
        ram_total_mib=int(ram[2]),
        largest_free_kib=None if ram[4] is None else int(ram[4]) * (1024 if ram[5] == "M" else 1),
        swap_used_mib=_int(swap, 1),
        swap_total_mib=_int(swap, 2),
        cores=_cores(text),
        emc_load_percent=_int(emc, 1),
        emc_clock_mhz=_int(emc, 2),
        gpu_load_percent=_int(gpu, 1),
        gpu_clocks_mhz=_gpu_clocks(gpu),
        temperatures_c=_temperatures(text),
        rails=_rails(text),
        engines=_engines(text),
        date=date[1] if date else None,
    )


def _int(found: re.Match[str] | None, group: int) -> int | None:
    return None if found is None or found[group] is None else int(found[group])


def _cores(text: str) -> tuple[Core, ...]:
    listed = _CPUS.search(text)
    return tuple(_core(word.strip()) for word in listed[1].split(",")) if listed and listed[1] else ()


def _core(word: str) -> Core:
    if word == "off":
        return Core(online=False)
    found = _CORE.fullmatch(word)
    return Core(True, _int(found, 1), _int(found, 2))


def _gpu_clocks(found: re.Match[str] | None) -> tuple[int, ...]:
    text = "" if found is None else found[2] or found[3] or ""
    return tuple(int(word) for word in text.split(",") if word)


def _temperatures(text: str) -> dict[str, float]:
    values = {found[1].lower(): number(found[2]) for found in _HEAT.finditer(text)}
    return {name: value for name, value in values.items() if value is not None and value > NO_SENSOR_C}


def _rails(text: str) -> dict[str, Rail]:
    return {found[1]: Rail(int(found[2]), int(found[3]), _int(found, 4)) for found in _RAIL.finditer(text)}


def _engines(text: str) -> dict[str, Engine]:
    engines = {}
    for found in _ENGINE.finditer(text):
        if found[1] in _NO_ENGINE or not found[2]:
            continue
        clock = found[4] or found[5]
        engines[found[1]] = Engine(found[2] != "off", _int(found, 3), int(clock) if clock else None)
    return engines
