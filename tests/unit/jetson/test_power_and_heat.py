"""Power modes by name, clocks, thermal zones by type, counters by chip, memory; all below a folder, all may be missing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmdeploy.jetson.binaries import MAX_BYTES, ask, find_program
from fmdeploy.jetson.clocks import find_clocks, parse_shown
from fmdeploy.jetson.machine import board_model, is_jetson
from fmdeploy.jetson.memory import read_memory, read_process
from fmdeploy.jetson.overcurrent import deltas, find_counters, read_counters
from fmdeploy.jetson.power import PowerMode, modes, parse_query, read_power
from fmdeploy.jetson.reading import number, read_int, read_number
from fmdeploy.jetson.snapshot import Probe
from fmdeploy.jetson.thermal import find_slowing, find_zones, read_slowing
from support.fakeboard import FakeBoard, bare_container, orin_nano_jp62, pc


@pytest.mark.parametrize(("text", "expected"), [
    ("NV Power Mode: 25W\n1\n", PowerMode("25W", 1)),
    ("NV Fan Mode:quiet\nNV Power Mode: MAXN_SUPER\n2\n", PowerMode("MAXN_SUPER", 2)),
    ("NV Power Mode: MODE_15W_6CORE\n", PowerMode("MODE_15W_6CORE", None)),
    ("NVPM WARN: fan mode is not set!\nNV Power Mode: 15W\n 0 \n", PowerMode("15W", 0)),
    ("", None), ("NV Power Mode:\n", None), ("1\n", None), ("\ufffd\ufffd", None),
])
def test_query(text: str, expected: PowerMode | None) -> None:
    assert parse_query(text) == expected


@given(st.text(max_size=200))
def test_query_of_anything(text: str) -> None:
    parse_query(text)
    parse_query(f"NV Power Mode: {text}")
    parse_shown(text)


def test_mode_by_name_and_its_contradictions(tmp_path: Path) -> None:
    board = orin_nano_jp62(tmp_path / "b")
    assert [(mode.id, mode.name, sum(mode.cores.values())) for mode in modes(board.root)] == [
        (0, "15W", 6), (1, "25W", 6), (2, "MAXN_SUPER", 6), (3, "7W", 4)]
    power = read_power(board.root)
    assert (power.mode, power.contradictions, power.against("25W")) == (PowerMode("25W", 1), (), "")
    assert power.against("15W") == "the board is in power mode 25W (id 1), the budget is for 15W"
    board.query("7W", 3)
    board.status(3)
    assert read_power(board.root).contradictions == (
        "cpu4 is online, cpu5 is online, not so in mode 7W: it was set and never took effect",)
    board.query("40W", 4)
    assert "nvpmodel.conf does not have" in read_power(board.root).contradictions[1]


def test_without_the_tool_its_files_speak(tmp_path: Path) -> None:
    board = orin_nano_jp62(tmp_path / "b")
    (board.root / "usr/sbin/nvpmodel").unlink()
    assert read_power(board.root).mode == PowerMode("25W", 1)
    board.status(9)
    assert read_power(board.root).problem == "neither nvpmodel nor its status file is here"


@pytest.mark.parametrize(("script", "problem"), [
    ("exit 3", "nvpmodel ended with code 3"),
    ("sleep 60", "nvpmodel did not answer within 0.5 s"),
    ("sleep 60 & wait", "nvpmodel did not answer within 0.5 s"),
    ("echo nonsense", "nvpmodel -q names no mode"),
    ("printf '\\377\\376'", "nvpmodel -q names no mode"),
])
def test_a_tool_that_fails_is_unknown(tmp_path: Path, script: str, problem: str) -> None:
    board = orin_nano_jp62(tmp_path / "b")
    board.program("nvpmodel", script, folder="usr/sbin")
    start = time.monotonic()
    power = read_power(board.root, timeout_s=0.5)
    assert (power.mode, power.problem) == (None, problem)
    assert time.monotonic() - start < 10


def test_programs_outside_the_root_are_not_run(tmp_path: Path) -> None:
    board = FakeBoard(tmp_path / "b")
    outside = FakeBoard(tmp_path / "o").program("nvpmodel", f"touch {tmp_path}/ran")
    (board.root / "usr/bin").mkdir(parents=True)
    (board.root / "usr/bin/nvpmodel").symlink_to(outside)
    assert find_program("nvpmodel", board.root) is None
    assert ask("nvpmodel", "-q", root=board.root).text is None
    assert ask("ls", root=board.root).problem == "ls is not here"
    assert not (tmp_path / "ran").exists()


def test_zones_by_type_never_by_index(tmp_path: Path) -> None:
    board = orin_nano_jp62(tmp_path / "b")
    zones = {zone.name: zone for zone in find_zones(board.root)}
    assert zones["tj-thermal"].celsius() == 52.8
    assert zones["tj-thermal"].limit_c == 95.0, "fan trips do not slow the board"
    assert zones["cv0-thermal"].celsius() is None, "-256: no power"
    assert zones["cv1-thermal"].celsius() is None, "0.0: no power"
    board.zone(1, "cv0-thermal", "garbage\n")
    assert zones["cv0-thermal"].celsius() is None
    board.zone(8, "other", 20.0)
    board.zone(3, "TJ-thermal", 61.0)
    assert {zone.name: zone.celsius() for zone in find_zones(board.root)}["tj-thermal"] == 61.0


def test_impossible_limits_are_no_limits(tmp_path: Path) -> None:
    board = FakeBoard(tmp_path / "b")
    board.zone(0, "acpitz", 27.8, (("critical", 20.8), ("hot", 0.0), ("passive", -274.0)))
    assert [(zone.celsius(), zone.limit_c) for zone in find_zones(board.root)] == [(27.8, None)]


def test_what_slows_the_board(tmp_path: Path) -> None:
    board = orin_nano_jp62(tmp_path / "b")
    assert read_slowing(find_slowing(board.root)) == {"cpufreq-cpu0.1": 0, "gpu-throttle-alert.2": 0}, "the fan does not"
    board.cooling(2, "gpu-throttle-alert", 1)
    assert read_slowing(find_slowing(board.root))["gpu-throttle-alert.2"] == 1


def test_counters_by_the_name_of_the_chip(tmp_path: Path) -> None:
    board = orin_nano_jp62(tmp_path / "b")
    files = find_counters(board.root)
    before = read_counters(files)
    assert before == {"oc1": 0, "oc2": 0, "oc3": 0}
    board.over_current(oc3=5)
    assert deltas(before, read_counters(files)) == {"oc1": 0, "oc2": 0, "oc3": 5}
    (board.root / "sys/class/hwmon/hwmon3/oc2_event_cnt").write_text("nonsense")
    assert "oc2" not in read_counters(files), "unknown, not 0"
    assert read_counters(find_counters(pc(tmp_path / "p").root)) == {"cpu0_throttle": 7}


def test_clocks_and_load(tmp_path: Path) -> None:
    board = orin_nano_jp62(tmp_path / "b")
    clocks = {clock.name: clock for clock in find_clocks(board.root)}
    assert set(clocks) == {f"cpu{core}" for core in range(6)} | {"gpu"}
    assert (clocks["cpu0"].mhz(), clocks["gpu"].mhz(), clocks["gpu"].load_percent()) == (1728.0, 612.0, 13.0)
    board.write("sys/class/devfreq/17000000.gpu/device/load", "\n")
    assert clocks["gpu"].load_percent() is None, "unknown, not 0"


def test_shown_clocks() -> None:
    found = parse_shown("cpu0: Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1510400 CurrentFreq=1510400 IdleStates: WFI=1\n"
                        "GPU MinFreq=306000000 MaxFreq=918000000 CurrentFreq=306000000\n"
                        "EMC MinFreq=3199000000 MaxFreq=3199000000 CurrentFreq=3199000000 FreqOverride=1\nFan: PWM=0\n")
    assert list(found) == ["cpu0", "GPU", "EMC"]
    assert (found["GPU"].high, found["GPU"].pinned, found["EMC"].pinned) == (918000000, False, True)


def test_memory_of_board_and_process(tmp_path: Path) -> None:
    board = orin_nano_jp62(tmp_path / "b")
    found = read_memory(board.root)
    assert (found.used_mib, found.nvmap_mib, found.swapped_in_pages) == (3220.0, 120.0, 0)
    empty = read_memory(tmp_path / "nothing")
    assert (empty.used_mib, empty.nvmap_mib, empty.swapped_in_pages) == (None, None, None)
    mine = read_process(os.getpid())
    assert mine.rss_mib is not None
    assert mine.peak_mib is not None
    assert mine.pss_mib is not None
    assert mine.pss_mib > 1
    assert mine.peak_mib >= mine.rss_mib * 0.99 > 10
    assert read_process(2**22 + 1) == read_process(1, tmp_path)


def test_a_container_is_known_by_its_kernel(tmp_path: Path) -> None:
    container = bare_container(tmp_path / "c").root
    assert is_jetson(container)
    assert board_model(container) is None
    assert not is_jetson(pc(tmp_path / "p").root)


def test_numbers() -> None:
    assert number("1,5") == 1.5
    assert [number(text) for text in ("nan", "inf", "", "x", "1e999")] == [None] * 5
    assert read_int(Path("/proc/self/nothing")) is None
    assert read_number(Path("/proc")) is None


def test_a_snapshot_of_this_very_machine_and_of_nothing(tmp_path: Path) -> None:
    here = Probe().take()
    assert here.memory.used_mib is not None
    assert here.memory.used_mib > 0
    nothing = Probe(tmp_path).take()
    assert (nothing.memory.used_mib, nothing.gpu_load_percent, nothing.power_mode, nothing.margin_c) == (None,) * 4
    assert nothing.temperatures_c == nothing.clocks_mhz == nothing.events == {}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("script", "problem"), [
    ("exec cat /dev/zero", "printed more than"), ("sleep 600 & exit 0", "did not answer within 1 s"),
    ("exec >&-; exec sleep 600", "did not answer within 1 s"), ("exit 3", "ended with code 3"), ("kill -9 $$", "ended with code -9")])
def test_tools_without_an_end_are_bounded_in_time_and_memory(script: str, problem: str, tmp_path: Path) -> None:
    board = orin_nano_jp62(tmp_path / "b")
    board.program("nvpmodel", f"echo $$ > {tmp_path}/group; {script}", folder="usr/sbin")
    before = read_process(os.getpid()).peak_mib or 0.0
    answer = ask("nvpmodel", "-q", root=board.root, timeout_s=1.0)
    assert (answer.text, problem in answer.problem) == (None, True), answer.problem
    assert (read_process(os.getpid()).peak_mib or 0.0) - before < 30
    until = time.monotonic() + 20
    while _group_lives(int((tmp_path / "group").read_text())):
        assert time.monotonic() < until, "something of it still runs"
        time.sleep(0.01)


def _group_lives(group: int) -> bool:
    """Whether a process of this group is there; children of a killed one are reaped by init in its own time."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_tools_that_answer_are_heard_to_the_end(tmp_path: Path) -> None:
    board = orin_nano_jp62(tmp_path / "b")
    board.program("nvpmodel", "head -c 50000 /dev/zero | tr '\\0' x; sleep 0.1; echo end", folder="usr/sbin")
    assert ask("nvpmodel", root=board.root).text == "x" * 50_000 + "end\n"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", ["\n", " ", " \n", "a", "a ", "x MinFreq=1 MaxFreq=2 ", "NV Power Mode: ", "NV Power Mode: x \n", "< POWER_MODEL ID=1 NAME=",
                                  "CPU_ONLINE CORE_1 ", "1\n", "MinFreq="])
def test_time_to_read_an_answer_grows_with_it_and_not_faster(text: str, tmp_path: Path) -> None:
    board = FakeBoard(tmp_path / "b")
    answer = (text * MAX_BYTES)[:MAX_BYTES]
    board.write("etc/nvpmodel.conf", answer)
    start = time.perf_counter()
    parse_query(answer)
    parse_query(f"NV Power Mode: {answer}")
    parse_shown(answer)
    modes(board.root)
    assert time.perf_counter() - start < 3
