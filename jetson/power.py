"""Power modes: what is set, as far as three sources agree on it.

A mode is known by its *name*: ids differ from module to module. Setting one may fail in silence (over SSH, a mode with
other cores needs a restart, and `nvpmodel -q` keeps the old one), so nothing here believes that a mode was set: it is
read back, from the tool, from its status file, and from the cores that are really online.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fmdeploy.jetson.binaries import TIMEOUT_S, ask, find_program
from fmdeploy.jetson.machine import POWER_MODES, POWER_STATUS
from fmdeploy.jetson.reading import children, read_int, read_text

# Blanks within a line, never line ends: `^\s*` would look through all empty lines again from each of them.
_NAME = re.compile(r"^[ \t]*NV Power Mode:[ \t]*(\S.*)$", re.MULTILINE)
_ID = re.compile(r"^[ \t]*(\d{1,4})[ \t\r]*$", re.MULTILINE)
_MODEL = re.compile(r"^[ \t]*<[ \t]*POWER_MODEL[ \t]+ID=(\d{1,4})[ \t]+NAME=(\S+)[ \t]*>", re.MULTILINE)
_CORE = re.compile(r"^[ \t]*CPU_ONLINE[ \t]+CORE_(\d{1,3})[ \t]+([01])[ \t\r]*$", re.MULTILINE)


@dataclass(frozen=True)
class PowerMode:
    """A power mode. The number alone means nothing on another module."""

    name: str
    id: int | None = None

    def __str__(self) -> str:
        return self.name if self.id is None else f"{self.name} (id {self.id})"


@dataclass(frozen=True)
class Mode:
    """A mode in the board's table: which cores it has online, where the table says so."""

    id: int
    name: str
    cores: dict[int, bool]


@dataclass(frozen=True)
class Power:
    """What the board says about its power mode.

    Attributes:
        mode: Mode by `nvpmodel -q`; None when unknown.
        problem: Why it is unknown; empty when it is known.
        contradictions: What does not fit to it: the status file, the table, the cores online.
    """

    mode: PowerMode | None
    problem: str = ""
    contradictions: tuple[str, ...] = ()

    def against(self, wanted: str) -> str:
        """Return why a measurement for the mode named `wanted` is worthless now; empty when it is not."""
        if self.mode is None:
            return f"the power mode is unknown: {self.problem}"
        if self.mode.name != wanted:
            return f"the board is in power mode {self.mode}, the budget is for {wanted}"
        return "; ".join(self.contradictions)


def parse_query(text: str) -> PowerMode | None:
    """Parse `nvpmodel -q`: the name after `NV Power Mode:` and the id below it; None where there is no name."""
    found = _NAME.search(text)
    if found is None:
        return None
    number = _ID.search(text, found.end())
    return PowerMode(found[1].rstrip(), int(number[1]) if number else None)


def modes(root: Path = Path("/")) -> list[Mode]:
    """Return the modes of this very board, from its nvpmodel.conf."""
    text = read_text(root / POWER_MODES) or ""
    heads = list(_MODEL.finditer(text))
    if not heads:
        return []
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return [Mode(int(head[1]), head[2], {int(core): state == "1" for core, state in
                                         _CORE.findall(text[head.end() : end])})
            for head, end in zip(heads, ends, strict=True)]


def read_power(root: Path = Path("/"), timeout_s: float = TIMEOUT_S) -> Power:
    """Ask the board, and hold the answer against everything else that it says."""
    if find_program("nvpmodel", root) is None:  # in a container there may be its files alone
        mode, problem = _from_files(root), "neither nvpmodel nor its status file is here"
    else:
        answer = ask("nvpmodel", "-q", root=root, timeout_s=timeout_s)
        mode = None if answer.text is None else parse_query(answer.text)
        problem = answer.problem or "nvpmodel -q names no mode"
    if mode is None:
        return Power(None, problem)
    return Power(mode, "", tuple(_contradictions(mode, root)))


def _from_files(root: Path) -> PowerMode | None:
    status = status_id(root)
    return next((PowerMode(known.name, known.id) for known in modes(root) if known.id == status), None)


def _contradictions(mode: PowerMode, root: Path) -> list[str]:
    table = modes(root)
    found = []
    status = status_id(root)
    if status is not None and mode.id is not None and status != mode.id:
        name = next((known.name for known in table if known.id == status), "unknown")
        found.append(f"nvpmodel says {mode}, its status file says {name} (id {status})")
    known = next((known for known in table if known.name == mode.name), None)
    if table and known is None:
        found.append(f"nvpmodel says {mode}, which the board's nvpmodel.conf does not have")
    elif known is not None and mode.id is not None and known.id != mode.id:
        found.append(f"nvpmodel says {mode}, in nvpmodel.conf {known.name} has id {known.id}")
    if known is not None:
        found += _cores_differ(known, online_cores(root))
    return found


def _cores_differ(mode: Mode, online: dict[int, bool]) -> list[str]:
    wrong = [core for core, state in mode.cores.items() if core in online and online[core] != state]
    if not wrong:
        return []
    text = ", ".join(f"cpu{core} is {'online' if online[core] else 'offline'}" for core in wrong)
    return [f"{text}, not so in mode {mode.name}: it was set and never took effect"]


def status_id(root: Path = Path("/")) -> int | None:
    """Return the id of the mode that was set last, from nvpmodel's status file; None when unknown."""
    found = re.search(r"pmode:(\d{1,4})", read_text(root / POWER_STATUS) or "")
    return int(found[1]) if found else None


def online_cores(root: Path = Path("/")) -> dict[int, bool]:
    """Return which cores are online; a core without a switch, as the first one often is, is left out."""
    found = {}
    for path in children(root / "sys/devices/system/cpu", "cpu[0-9]*/online"):
        state = read_int(path)
        if state is not None:
            found[int(path.parent.name.removeprefix("cpu"))] = bool(state)
    return found
