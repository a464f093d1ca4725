"""The build process: its death, its slowness and its hunger become a report, and nothing of it is left."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from fmdeploy.export.tensorrt.builder import Options
from fmdeploy.export.tensorrt.isolated import Ended, Limits, build_isolated

PLENTY = Limits(timeout_s=30, memory_mib=4096, floor_mib=0)


def run(script: str, tmp_path: Path, limits: Limits = PLENTY, proc: Path = Path("/proc")) -> Ended:
    """Build with a child that runs `script`; `folder` is where a result would go."""
    model = tmp_path / "m.onnx"
    model.write_bytes(b"model")
    head = "import json, sys, os, signal, time, subprocess, pathlib\njob = json.load(sys.stdin)\nfolder = pathlib.Path(job['folder'])\n"
    return build_isolated("tensorrt-rtx", model, "0" * 64, Options(), limits,
                          command=(sys.executable, "-S", "-c", head + script), proc=proc)


def test_a_killed_child_is_a_crash_that_names_the_signal(tmp_path: Path) -> None:
    found = run("print('last words', flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)", tmp_path)
    assert found.fate == "crashed"
    assert "killed by SIGSEGV: last words" in str(found.problems[0])


@pytest.mark.parametrize("script", ["sys.exit(3)", "(folder / 'result.json').write_text('{')", "raise ValueError('no')"])
def test_a_child_without_a_result_is_a_crash(script: str, tmp_path: Path) -> None:
    assert run(script, tmp_path).fate == "crashed"


def test_a_slow_child_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    script = (f"p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
              f"pathlib.Path({str(note)!r}).write_text(str(p.pid))\ntime.sleep(60)")
    started = time.monotonic()
    found = run(script, tmp_path, Limits(1.0, 4096, 0))
    assert (found.fate, time.monotonic() - started < 10) == ("timeout", True)
    assert "1 s without a result" in str(found.problems[0])
    _gone(int(note.read_text()))


def _gone(pid: int) -> None:
    """Killed processes whose parent is gone are reaped by the init process, which takes a moment."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


def test_a_hungry_child_is_killed(tmp_path: Path) -> None:
    found = run("x = bytearray(300 * 2**20)\nfor k in range(0, len(x), 4096): x[k] = 1\ntime.sleep(60)", tmp_path,
                Limits(30, 100, 0))
    assert found.fate == "out-of-memory"
    assert "limit is 100 MiB" in str(found.problems[0])


def test_gpu_memory_of_a_jetson_counts(tmp_path: Path) -> None:
    """It is in no resident set: only NvMapMemUsed of the machine tells. The child makes it grow, as a build would."""
    proc = tmp_path / "proc"
    proc.mkdir()
    meminfo = proc / "meminfo"
    meminfo.write_text("NvMapMemUsed:      1024 kB\n")
    script = f"pathlib.Path({str(meminfo)!r}).write_text('NvMapMemUsed:   3146752 kB\\n')\ntime.sleep(60)"
    found = run(script, tmp_path, Limits(30, 1000, 0), proc)
    assert (found.fate, "killed at 3072 MiB" in str(found.problems[0])) == ("out-of-memory", True)


def test_the_machine_keeps_its_floor(tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "meminfo").write_text("MemAvailable:    51200 kB\n")
    found = run("time.sleep(60)", tmp_path, Limits(30, 1000, 128), proc)
    assert "50 MiB left on the machine" in str(found.problems[0])


def test_an_interrupt_leaves_no_orphan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "pid"

    def press_ctrl_c() -> None:
        if note.exists() and note.read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr("fmdeploy.interrupt.check", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        run(f"pathlib.Path({str(note)!r}).write_text(str(os.getpid()))\ntime.sleep(60)", tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_a_result_comes_back_whole(tmp_path: Path) -> None:
    script = """
(folder / 'engine.plan').write_bytes(b'engine'); (folder / 'timing.cache').write_bytes(b'times')
(folder / 'result.json').write_text(json.dumps({'engine_bytes': 6, 'timing_cache_bytes': 5, 'problems': [],
    'nodes': [{'name': 'n', 'kind': 'CONVOLUTION'}]}))
"""
    found = run(script, tmp_path)
    assert (found.fate, found.engine, found.timing_cache) == ("done", b"engine", b"times")
    assert found.nodes[0].name == "n"


def test_a_dead_parent_takes_the_child_along(tmp_path: Path) -> None:
    """SIGKILL leaves the parent no time to clean up: the kernel does it."""
    import subprocess

    note, model = tmp_path / "pid", tmp_path / "m.onnx"
    model.write_bytes(b"model")
    child = f"import pathlib, os, time, json, sys\njob = json.load(sys.stdin)\nfrom fmdeploy.export.tensorrt.child import _die_with\n_die_with(job['parent'])\npathlib.Path({str(note)!r}).write_text(str(os.getpid()))\ntime.sleep(60)"
    parent = ("from pathlib import Path\nimport sys\nfrom fmdeploy.export.tensorrt.builder import Options\n"
              "from fmdeploy.export.tensorrt.isolated import Limits, build_isolated\n"
              f"build_isolated('tensorrt-rtx', Path({str(model)!r}), '0', Options(), Limits(60, 4096, 0),\n"
              f"               command=(sys.executable, '-c', {child!r}))")
    process = subprocess.Popen([sys.executable, "-c", parent])
    for _ in range(200):
        if note.exists() and note.read_text():
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    _gone(int(note.read_text()))
