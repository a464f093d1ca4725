"""The parser of tegrastats against nine real formats, the bugs of other parsers, and anything at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmdeploy.errors import DataError
from fmdeploy.jetson.tegrastats import Core, Engine, Rail, Sample, parse_line
from support.tegralines import LINES

Facts = tuple[tuple[int, int], tuple[int | None, int | None], int, int | None, tuple[int, ...], tuple[int | None, int | None]]
FACTS: dict[str, Facts] = {  # RAM, swap, online cores, GPU load, GPU clocks, EMC load and clock
    "A": ((407, 15823), (0, 7911), 6, 12, (), (0, None)),
    "B": ((4722, 7844), (149, 1024), 6, 12, (1300,), (2, 1866)),
    "C": ((2257, 30536), (0, 15268), 12, 7, (), (0, None)),
    "D": ((18207, 62841), (86, 31420), 12, 0, (0, 0), (3, 2133)),
    "E": ((6185, 7620), (851, 3810), 6, 63, (621,), (43, 2133)),
    "F": ((3162, 7620), (0, 3810), 4, 1, (), (None, None)),
    "G": ((20642, 62817), (None, None), 12, 12, (1300, 1300), (3, 3199)),
    "H": ((2845, 7486), (None, None), 6, 0, (305,), (3, 665)),
    "I": ((4208, 125773), (0, 2048), 14, None, (0, 0, 0), (0, 665)),
}


@pytest.mark.parametrize("key", LINES)
def test_sample_lines(key: str) -> None:
    found, (ram, swap, cores, load, clocks, emc) = parse_line(LINES[key]), FACTS[key]
    assert (found.ram_used_mib, found.ram_total_mib) == ram
    assert (found.swap_used_mib, found.swap_total_mib) == swap
    assert sum(core.online for core in found.cores) == cores
    assert (found.gpu_load_percent, found.gpu_clocks_mhz) == (load, clocks)
    assert (found.emc_load_percent, found.emc_clock_mhz) == emc


def test_temperatures_drop_dead_sensors() -> None:
    c = parse_line(LINES["C"]).temperatures_c
    assert c == {"cpu": 41.375, "tboard": 29.0, "soc2": 39.0, "tdiode": 30.75, "soc0": 38.906, "tj": 41.468, "soc1": 38.843}
    assert parse_line(LINES["B"]).temperatures_c["gpu"] == -51.0, "cold is not dead"
    assert parse_line(LINES["H"]).temperatures_c["tj"] == 46.562, "the present value, not the highest"
    assert "gpu" not in parse_line(LINES["D"]).temperatures_c, "no power, no sensor"


def test_rails() -> None:
    assert parse_line(LINES["D"]).rails == {"VDD_GPU_SOC": Rail(2412, 2412), "VDD_CPU_CV": Rail(1607, 1607),
                                            "VIN_SYS_5V0": Rail(4707, 4707)}
    assert parse_line(LINES["H"]).rails["VDD_IN"] == Rail(3462, 3522, 3582)
    assert parse_line(LINES["F"]).rails["VDD_CPU_GPU_CV"] == Rail(598, 598), "the unit was cut, the next rail is whole"
    assert parse_line(LINES["F"]).rails["VDD_SOC"] == Rail(1238, 1237)
    assert parse_line(LINES["A"]).rails["CPU"] == Rail(385, 385)
    assert parse_line(LINES["C"]).rails == {}


def test_engines() -> None:
    d = parse_line(LINES["D"]).engines
    assert d["NVENC"] == Engine(True, 79, 166)
    assert d["NVDLA0"] == Engine(False)
    assert d["PVA0"] == Engine(False)
    assert d["APE"] == Engine(True, None, 174)
    i = parse_line(LINES["I"]).engines
    assert i["NVENC0"] == Engine(True, None, 0), "a clock without a load"
    assert set(i) == {"NVENC0", "NVENC1", "NVDEC0", "NVDEC1", "NVJPG0", "VIC", "OFA", "PVA0", "APE"}
    assert parse_line(LINES["B"]).engines["NVENC"] == Engine(True, None, 716)


def test_cores_and_blocks() -> None:
    assert parse_line(LINES["F"]).cores[-2:] == (Core(False), Core(False))
    assert parse_line(LINES["A"]).cores[2] == Core(False)
    assert parse_line(LINES["E"]).cores[0] == Core(True, 15, 729)
    assert parse_line(LINES["B"]).largest_free_kib == 512
    assert parse_line(LINES["E"]).largest_free_kib == 2048
    assert parse_line(LINES["G"]).date == "07-25-2026 09:08:28"
    assert parse_line(LINES["A"]).date is None


def test_bugs_of_other_parsers() -> None:
    """`GR3D_FREQ 0%@[1300,1300]` was read as load 0 without a clock, and the 3 of GR3D as a load."""
    idle = parse_line("RAM 1/2MB GR3D_FREQ 0%@[1300,1300]")
    assert (idle.gpu_load_percent, idle.gpu_clocks_mhz) == (0, (1300, 1300))
    no_load = parse_line("RAM 1/2MB GR3D_FREQ @[1300,1300]")
    assert (no_load.gpu_load_percent, no_load.gpu_clocks_mhz) == (None, (1300, 1300))
    nothing = parse_line("RAM 1/2MB GR3D_FREQ")
    assert (nothing.gpu_load_percent, nothing.gpu_clocks_mhz) == (None, ())
    assert parse_line("RAM 1/2MB").gpu_load_percent is None
    assert parse_line("IRAM 0/252kB(lfb 252kB) RAM 5/9MB").ram_used_mib == 5


def test_a_comma_is_a_decimal_point_in_some_locales() -> None:
    assert parse_line("RAM 1/2MB cpu@52,562C/53,1C").temperatures_c == {"cpu": 52.562}


def test_unknown_words_are_passed_over() -> None:
    found = parse_line(LINES["E"].replace(" EMC", " FUTURE7 [a,b] quantum@@ 17%@x NEW_RAIL 5mW EMC"))
    assert found == parse_line(LINES["E"])


@pytest.mark.parametrize("line", ["", "RAM", "RAM 1/2", "RAM x/yMB", "SWAP 0/7911MB", "hello", "RAM 1/2GB", "\0\xff", "IRAM 1/2MB"])
def test_lines_without_memory_are_refused(line: str) -> None:
    with pytest.raises(DataError, match=r"no line of tegrastats \(expected RAM used/totalMB"):
        parse_line(line)


def _is_part(part: Sample, whole: Sample) -> None:
    for name, value in vars(part).items():
        full = getattr(whole, name)
        if isinstance(value, dict):
            assert value.items() <= full.items(), name
        else:
            assert value in (None, (), full), name


@pytest.mark.parametrize("key", LINES)
def test_a_cut_line_says_less_and_nothing_wrong(key: str) -> None:
    """Cut after every character: what is still said is what the whole line says."""
    whole, refused = parse_line(LINES[key]), 0
    for end in range(len(LINES[key])):
        try:
            part = parse_line(LINES[key][:end], complete=False)
        except DataError:
            refused += 1
            continue
        _is_part(part, whole)
    assert refused < 60, "all but the first words can be cut off"


@given(st.text(max_size=400))
def test_any_text(line: str) -> None:
    try:
        parse_line(line)
    except DataError:
        return


WORDS = sorted({word for line in LINES.values() for word in line.split()} | {"GR3D_FREQ", "@[", "9" * 5000, "-256C", "RAM 1/2MB", "@C"})


@given(st.lists(st.sampled_from(WORDS), max_size=40), st.sampled_from(list(LINES)), st.integers(0, 600), st.binary(max_size=8))
def test_shuffled_and_damaged_lines(words: list[str], key: str, at: int, junk: bytes) -> None:
    damaged = LINES[key].encode()[:at] + junk + LINES[key].encode()[at:]
    for text in (" ".join(words), "RAM 5/9MB " + " ".join(words), damaged.decode("utf-8", errors="replace")):
        try:
            found = parse_line(text)
        except DataError:
            continue
        assert all(value > -200 for value in found.temperatures_c.values())


def test_endless_lines_take_no_time() -> None:
    line = "RAM 5/9MB " + "CPU [" * 100_000 + "1%@" * 100_000
    assert parse_line(line).ram_used_mib == 5
