"""Heat, current, power modes and telemetry (faults.md 4.7), and the files of a board (M32), on boards made of files.

The runtime, the telemetry process, the tools and `check` are the real ones; only what they read is made up.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fmdeploy.artifact import open_artifact
from fmdeploy.command import Outcome
from fmdeploy.errors import DataError
from fmdeploy.jetson.machine import l4t_release
from fmdeploy.jetson.power import PowerMode, read_power
from fmdeploy.jetson.tegrastats import parse_line
from fmdeploy.jetson.telemetry import Telemetry
from fmdeploy.jetson.watch import COOL, THROTTLED, Watch
from fmdeploy.runtime import Runtime
from fmdeploy.runtime.check.check import check
from fmdeploy.runtime.measure.conditions import watched
from fmdeploy.runtime.measure.memory import PeakMemory
from fmdeploy.runtime.state import EventKind
from support.checkable import Checkable, make_checkable
from support.fakeboard import NANO_LINE, FakeBoard, orin_nano_jp62, pc
from support.fdti import Fdti
from support.runtimes import frame, toy_bundle
from support.tegralines import LINES
from support.waiting import PATIENCE_S, wait_for

PERIOD_S = 0.05


@pytest.fixture(scope="module")
def checkable(tmp_path_factory: pytest.TempPathFactory) -> Checkable:
    return make_checkable(tmp_path_factory.mktemp("checkable"))


@pytest.fixture
def board(tmp_path: Path) -> FakeBoard:
    return orin_nano_jp62(tmp_path / "board")


@contextmanager
def meanwhile(work: Callable[[int], object]) -> Iterator[None]:
    """Call `work` again and again in another thread."""
    done = threading.Event()

    def loop() -> None:
        turn = 0
        while not done.is_set():
            work(turn := turn + 1)
            done.wait(0.02)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def run_check(checkable: Checkable, board: FakeBoard, out: Path, power_mode: str = "25W", runs: int = 100) -> tuple[Outcome, dict[str, dict[str, Any]]]:
    """A real check on the board below a folder; rows by their name without the tier."""
    limits = out.with_name("budgets.toml")
    limits.write_text(checkable.loose.read_text().replace("p50_ms", f'power_mode = "{power_mode}"\np50_ms'))
    found = check(bundle=checkable.bundle, data=checkable.data, out=out, budgets=limits, runs=runs, root=board.root, tiers=("fp32",))
    return found, {row["name"].removeprefix("fp32 "): row for row in found.data["gates"]}


COSTS = ("latency p50", "latency p99", "memory peak")


def test_F31_control_a_quiet_board_passes(checkable: Checkable, board: FakeBoard, tmp_path: Path) -> None:
    """The same check on the same board, in the right mode and cool: latency and memory are measured and pass."""
    found, rows = run_check(checkable, board, tmp_path / "c")
    assert found.exit_code == 0, found.lines
    assert {rows[name]["result"] for name in COSTS} == {"pass"}
    conditions = found.data["conditions"]
    assert (conditions["power_mode"], conditions["tainted"], conditions["unknown"]) == ({"name": "25W", "id": 1}, [], [])
    assert conditions["events"] == {"oc1": 0, "oc2": 0, "oc3": 0}
    assert conditions["temperatures_c"]["tj-thermal"] == 52.8
    assert {"p50_ms", "p95_ms", "p99_ms", "max_ms", "n"} <= set(found.data["latency"]["fp32"])
    memory = PeakMemory(**{key: value for key, value in found.data["memory"]["fp32"].items() if key not in ("peak_mib", "why_not")})
    assert memory.board
    assert memory.peak_mib == memory.process_mib, "nothing else grew on this board"
    line = next(line for line in found.lines if line.startswith("conditions"))
    for fact in ("power mode 25W (id 1)", "gpu 612", "hottest tj-thermal 52.8", "oc3 +0", "swap-ins 0"):
        assert fact in line


def test_F31_a_throttled_run_is_tainted(checkable: Checkable, board: FakeBoard, tmp_path: Path, fdti: Fdti) -> None:
    def heat(turn: int) -> None:
        board.tj(min(52.8 + turn, 96.0))
        board.over_current(oc3=turn)

    with fdti.detecting("check: heat and oc3 during the run"), meanwhile(heat):
        found, rows = run_check(checkable, board, tmp_path / "c", runs=600)  # long enough for the other thread
    assert found.exit_code == 1
    for name in COSTS[:2]:
        assert (rows[name]["result"], rows[name]["value"]) == ("not measured", None)
        assert rows[name]["reason"].startswith("tainted: oc3 (instantaneous over-current)")
    assert rows["self-test"]["result"] == "pass", "heat makes a network slow, not wrong"
    assert found.data["conditions"]["events"]["oc3"] > 0
    stored = open_artifact(tmp_path / "c")
    assert any("tainted" in row["reason"] for row in stored.json("gates.json"))
    assert "tainted" in stored.path("junit.xml").read_text()


def test_F31_swapping_is_tainted_on_a_pc_too(tmp_path: Path) -> None:
    machine = pc(tmp_path / "pc")
    calm, conditions = watched(lambda: 1, machine.root)
    assert (calm, conditions.why_not) == (1, "")
    _, conditions = watched(lambda: machine.memory(nvmap_mib=None, swap_ins=9), machine.root)
    assert conditions.why_not == "tainted: 9 pages came back from swap"


def test_F31_memory_that_nobody_knows_is_no_peak() -> None:
    facts: dict[str, Any] = {"board": True, "process_mib": 80.0, "used_delta_mib": 300.0, "nvmap_delta_mib": 200.0, "swap_ins": 0}
    assert PeakMemory(**facts).peak_mib == 300.0, "the GPU's part is not resident in the process"
    for name, word in (("process_mib", "VmHWM"), ("used_delta_mib", "MemAvailable"), ("nvmap_delta_mib", "NvMapMemUsed"), ("swap_ins", "swap-ins")):
        missing = PeakMemory(**{**facts, name: None})
        assert missing.peak_mib is None
        assert word in missing.why_not
    assert PeakMemory(**{**facts, "swap_ins": 1}).peak_mib is None
    assert PeakMemory(process_mib=80.0, swap_ins=0).peak_mib == 80.0, "a PC has no NvMap"


def test_F31_the_runtime_goes_to_D1_at_the_limit(board: FakeBoard, fdti: Fdti) -> None:
    """Frames of a real runtime, events from a real telemetry process."""
    with Runtime(toy_bundle(), tiers=("fp32",)) as runtime, Watch(board.root, cool_after_s=0.5) as watch:
        def turn() -> str:
            for kind, detail in watch.events():
                told.append((kind, detail))
                runtime.publisher.tell(EventKind(kind), detail)
            seeds[0] += 1
            return runtime.infer(frame(seeds[0])).mode

        told: list[tuple[str, str]] = []
        seeds = [0]
        wait_for(watch.latest)
        assert {turn() for _ in range(10)} == {""}
        assert told == []
        start = time.monotonic()
        board.tj(95.0)
        wait_for(lambda: turn() == "D1")
        fdti.report(1e3 * (time.monotonic() - start), "tj at its limit: frames in D1")
        assert told == [(THROTTLED, "tj-thermal is at 95.0 °C, its limit is 95.0 °C")]
        board.tj(93.0)  # below the limit, and not below it by enough
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            assert turn() == "D1"
        board.tj(80.0)
        wait_for(lambda: turn() != "D1")
        assert [kind for kind, _ in told] == [THROTTLED, COOL]


def test_F32_the_set_command_is_not_trusted(checkable: Checkable, board: FakeBoard, tmp_path: Path, fdti: Fdti) -> None:
    """`nvpmodel -m 2` says nothing and does nothing, and `-q` keeps the old mode."""
    board.program("nvpmodel", "[ \"$1\" = -m ] && exit 0; printf 'NV Power Mode: 25W\\n1\\n'", folder="usr/sbin")
    with fdti.detecting("budget for another power mode"):
        assert read_power(board.root).against("MAXN_SUPER") == "the board is in power mode 25W (id 1), the budget is for MAXN_SUPER"
    found, rows = run_check(checkable, board, tmp_path / "c", power_mode="MAXN_SUPER")
    assert found.exit_code == 1
    assert {rows[name]["reason"] for name in COSTS[:2]} == {"the board is in power mode 25W (id 1), the budget is for MAXN_SUPER"}


def test_F32_control_the_right_mode_is_measured(board: FakeBoard) -> None:
    result, conditions = watched(lambda: 7, board.root)
    assert (result, conditions.against("25W"), conditions.against(None)) == (7, "", "")
    assert conditions.against("15W") == "the board is in power mode 25W (id 1), the budget is for 15W"


def test_F32_a_mode_that_never_took_effect(board: FakeBoard) -> None:
    """The tool already claims the new mode, with four cores; six are online until the next restart."""
    board.query("7W", 3)
    _, conditions = watched(lambda: None, board.root)
    assert "nvpmodel says 7W (id 3), its status file says 25W (id 1)" in conditions.why_not
    assert "never took effect" in conditions.why_not


def test_F32_the_mode_changes_during_the_run(board: FakeBoard) -> None:
    def change() -> None:
        board.status(0)
        board.query("15W", 0)

    _, conditions = watched(change, board.root)
    assert conditions.why_not.startswith("tainted: ")
    assert "the power mode changed from 25W (id 1) to 15W (id 0)" in conditions.why_not


def test_F32_a_mode_that_took_effect_only_during_the_run(board: FakeBoard) -> None:
    """The tool said 7W from the start; two cores went offline, and the status file caught up, while it was measured."""
    board.query("7W", 3)

    def late() -> None:
        board.status(3)
        for core in (4, 5):
            board.write(f"sys/devices/system/cpu/cpu{core}/online", "0\n")

    _, conditions = watched(late, board.root)
    assert read_power(board.root).contradictions == (), "control: afterwards all agree"
    assert "never took effect" in "; ".join(conditions.tainted)
    assert "7W" in conditions.against("7W")


@pytest.mark.parametrize("script", ["sleep 600", "exit 1", "printf '\\377\\000'"])
def test_F32_an_unknown_mode_is_not_measured(script: str, board: FakeBoard) -> None:
    board.program("nvpmodel", script, folder="usr/sbin")
    power = read_power(board.root, timeout_s=0.3)
    assert power.mode is None
    assert power.against("25W").startswith("the power mode is unknown: nvpmodel")


HANGS = f"echo '{NANO_LINE}'; exec sleep 600"
TEGRASTATS = {
    "hangs at once": ("exec sleep 600", "silent"),
    "hangs after a line": (HANGS, "silent"),
    "garbage": ("while :; do head -c 200 /dev/urandom; echo; sleep 0.05; done", "garbage"),
    "garbage without an end": ("exec cat /dev/zero", "garbage"),
    "exits": (f"echo '{NANO_LINE}'; exit 0", "exited"),
    "ignores signals": ("trap '' TERM INT HUP; while :; do sleep 600; done", "silent"),
}


def test_F33_control_tegrastats_speaks(board: FakeBoard) -> None:
    with Telemetry(board.root) as telemetry:
        telemetry.begin()
        wait_for(lambda: (window := telemetry.window()) and window.tegrastats == "ok")
        window = telemetry.end()
    assert window is not None
    assert window.rails_mw == {"VDD_IN": (3913, 3913), "VDD_SOC": (1238, 1238)}


@pytest.mark.parametrize("case", TEGRASTATS)
def test_F33_tegrastats_that_hangs_raves_or_dies(case: str, board: FakeBoard, fdti: Fdti) -> None:
    """Telemetry says UNKNOWN, no value is 0, and no frame is lost or waits for it."""
    script, state = TEGRASTATS[case]
    board.program("tegrastats", script)
    with Runtime(toy_bundle(), tiers=("fp32",)) as runtime, Telemetry(board.root) as telemetry:
        start = time.monotonic()
        telemetry.begin()
        slowest, number = 0.0, 0
        if script == HANGS:  # before its line it is silent, too
            wait_for(lambda: (window := telemetry.window()) and window.tegrastats == "ok")
        while (window := telemetry.window()) is None or window.tegrastats != state:
            assert time.monotonic() - start < PATIENCE_S
            before = time.monotonic()
            telemetry.latest()
            slowest, number = max(slowest, time.monotonic() - before), number + 1
            assert runtime.infer(frame(number)).valid
            time.sleep(0.01)
        fdti.report(1e3 * (time.monotonic() - start), f"tegrastats {case}: {state}")
        window = telemetry.end()
    assert window is not None
    assert window.tegrastats == state
    assert 0 not in [value for pair in window.rails_mw.values() for value in pair]
    assert window.temperatures_c["tj-thermal"] == 52.8, "the kernel's own files still speak"
    assert slowest < 1.0


BAD = {
    "cut": LINES["D"][:60].encode(),
    "cut in a number": LINES["E"][:43].encode(),
    "empty": b"",
    "not UTF-8": b"RAM \xff\xfe18207/62841MB \x80",
    "NUL": b"\0" * 100,
    "another program": b"top - 19:32:01 up 1 day\n",
}


RAM_OF = {"cut": (18207, 62841, None), "cut in a number": (6185, 7620, None)}


@pytest.mark.parametrize("case", BAD)
def test_M32_files_of_a_board_parse_or_are_unknown(case: str, tmp_path: Path, fdti: Fdti) -> None:
    board = orin_nano_jp62(tmp_path / "b")
    raw = BAD[case]
    with fdti.detecting(case):
        if case.startswith("cut"):
            said = parse_line(raw.decode("utf-8", errors="replace"), complete=False)
            assert (said.ram_used_mib, said.ram_total_mib, said.gpu_load_percent) == RAM_OF[case]
        else:
            with pytest.raises(DataError, match="no line of tegrastats"):
                parse_line(raw.decode("utf-8", errors="replace"), complete=False)
        board.write("etc/nv_tegra_release", raw)
        board.write("var/lib/dpkg/status", raw)
        board.write("answer", raw)
        board.program("nvpmodel", f"cat '{board.root}/answer'", folder="usr/sbin")
        assert l4t_release(board.root) is None
        assert read_power(board.root).mode is None


def test_M32_control_good_files_and_lines(board: FakeBoard) -> None:
    assert l4t_release(board.root) == "36.4.4"
    assert read_power(board.root).mode == PowerMode("25W", 1)
    for line in LINES.values():
        assert parse_line(line).ram_total_mib > 0
    assert parse_line("RAM 1/2MB tj@52,5C").temperatures_c == {"tj": 52.5}, "a locale with a decimal comma"
    json.dumps(parse_line(LINES["G"]).rails["VDD_GPU_SOC"].__dict__)
