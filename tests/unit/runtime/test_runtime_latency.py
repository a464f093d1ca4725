"""What is measured is what is said: percentiles, paired speed-ups, peaks, overhead."""

from __future__ import annotations

import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from fmdeploy.errors import ArtifactError
from fmdeploy.evaluate.gates import Result, Row, limit_gate, not_measured
from fmdeploy.runtime import Runtime, open_bundle
from fmdeploy.runtime.check.gatefiles import junit, markdown, text_lines
from fmdeploy.runtime.measure.bench import bench
from fmdeploy.runtime.measure.latency import golden_frames, interleave, measure_overhead, speedup, summary
from fmdeploy.runtime.measure.memory import peak_mib, probe_memory
from support.runtimes import frame, runtime, toy_bundle


def test_summary() -> None:
    found = summary([float(i) for i in range(1, 102)])
    assert (found["n"], found["p50_ms"], found["p99_ms"], found["max_ms"]) == (101, 51, 100, 101)
    assert summary([1.0] * 99)["p99_ms"] is None, "99 runs have no 99th percentile"
    assert summary([]) == {"n": 0, "p50_ms": None, "p95_ms": None, "p99_ms": None, "max_ms": None}


def test_speedup_is_paired_and_has_an_interval() -> None:
    rng = np.random.default_rng(0)
    load = rng.gamma(2, 2, size=200)  # a machine that is busy now and then
    found = speedup(3 * load * rng.normal(1, 0.02, 200), load)
    assert found.value == pytest.approx(3, rel=0.01)
    assert 2.97 < found.low <= found.value <= found.high < 3.03
    control = speedup(load * rng.normal(1, 0.02, 200), load)
    assert control.low < 1 < control.high
    assert np.isnan(speedup([], []).value)


def test_interleaved_calls_are_told_apart() -> None:
    times = interleave({"slow": lambda _: time.sleep(2e-3), "fast": lambda _: time.sleep(2e-4)}, 30)
    assert len(times["slow"]) == len(times["fast"]) == 30
    assert speedup(times["slow"], times["fast"]).low > 2


def test_overhead_has_a_control() -> None:
    target = runtime()
    found = measure_overhead(target, golden_frames(target.bundle), 60)
    assert found["infer_us"] > found["bare_us"]
    assert found["overhead_us"] > 0
    assert abs(found["control_us"]) < found["bare_us"], "bare against bare must be far smaller than bare itself"


def test_overhead_lets_no_side_always_follow_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call after `infer` pays for its caches. With a fixed order that would be the same bare run every time."""
    calls: list[str] = []
    target = runtime()

    def bare(feeds: object) -> None:
        calls.append("bare")
        time.sleep(2e-3 if calls[-2:-1] == ["infer"] else 0)

    monkeypatch.setattr(target, "infer", lambda frame: calls.append("infer"))
    monkeypatch.setattr(target.backend, "run", bare)
    found = measure_overhead(target, golden_frames(target.bundle), 60)
    assert calls.count("bare") == 2 * calls.count("infer")
    assert abs(found["control_us"]) < 1000


def test_peak_memory(tmp_path: Path) -> None:
    here = peak_mib()
    assert here is not None
    assert here > 20
    assert peak_mib(tmp_path / "nothing") is None
    bundle = open_bundle(toy_bundle())
    probed = probe_memory(bundle, "fp32", threads=1).peak_mib
    assert probed is not None
    assert 20 < probed < here, "a fresh process, not this one, which has loaded the tests"
    refused = probe_memory(bundle, "int4", threads=1)
    assert refused.peak_mib is None
    assert refused.why_not == "int4 does not run in a process of its own (exit 1)"


def test_bench_command() -> None:
    found = bench(bundle=toy_bundle(), runs=100)
    assert set(found.data["tiers"]) == {"int8-cpu", "fp32"}
    row = found.data["tiers"]["fp32"]
    assert row["n"] == 100
    assert row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] <= row["max_ms"]
    assert {"overhead_us", "control_us", "ratio"} <= set(row["overhead"])
    assert row["peak_mib"] > 20
    assert set(found.data["speedup"]) == {"int8-cpu"}
    assert row["memory"]["process_mib"] == row["peak_mib"]
    assert found.data["conditions"]["swap_ins"] is not None
    assert found.data["conditions"]["rate_hz"] > 0
    assert {"processor", "packages", "machine", "l4t", "board"} <= set(found.data["environment"])
    assert any(line.startswith("conditions: ") for line in found.lines)
    assert any("times as fast as fp32" in line for line in found.lines)


def test_bench_says_what_was_refused() -> None:
    found = bench(bundle=toy_bundle(), runs=30, tiers=("fp32", "int4"))
    assert "no model.int4.onnx" in found.data["refused"]["int4"]
    with pytest.raises(ArtifactError):
        bench(bundle=toy_bundle().parent / "nothing", runs=30)


ROWS = [
    limit_gate("p50 <&> \x00", 1.0, 2.0, "ms"),
    Row("drop", Result.FAIL, 0.02, 0.01, "1", (0.01, 0.03), None, 500, True, "drop 0.02 > 0.01 | bad"),
    not_measured("teacher", "no evaluation", limit=0.1, unit="1"),
    not_measured("drop", "6 samples, 100 needed", limit=0.1, unit="1", part="rare", required=False),
]


def test_junit_shows_what_was_not_measured_as_an_error() -> None:
    root = ElementTree.fromstring(junit(ROWS, "check"))
    suite = root[0]
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    for node in (root, suite):
        assert {key: node.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
            "tests": "3", "failures": "1", "errors": "1", "skipped": "0"}
    cases = suite.findall("testcase")
    assert [[child.tag for child in case] for case in cases] == [[], ["failure"], ["error"]]
    assert "not measured: no evaluation" in str(cases[2][0].get("message"))
    assert "6 samples" in str(suite.findtext("system-out"))


def test_markdown_has_one_row_a_gate_and_what_blocks_first() -> None:
    lines = markdown(ROWS, "check", ["a note"]).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert "did not pass" in lines[0]
    assert len(table) == 2 + len(ROWS)
    assert "fail" in table[2]
    assert "2.00 %" in table[2]
    assert "\\| bad" in table[2]
    assert "too small to block" in "\n".join(table)
    assert all(line.count("|") - line.count("\\|") == 8 for line in table)


def test_terminal_lines_count_passing_slices() -> None:
    passing = Row("drop", Result.PASS, 0.0, 0.1, "1", (0.0, 0.01), "weather=fog", 500)
    assert text_lines([*ROWS, passing])[-1].endswith("1 slices")


def test_latency_of_a_frame_is_positive_and_part_of_its_age() -> None:
    found = Runtime(toy_bundle()).infer(frame())
    assert 0 < found.latency_ms <= found.age_ms + 1e-9
