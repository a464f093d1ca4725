"""The doctor on boards made of files, and on this machine; every finding that is not ok names a fix or says why not."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fmdeploy.errors import ConfigError
from fmdeploy.jetson.checks.container import may_open
from fmdeploy.jetson.checks.dla import dla_support
from fmdeploy.jetson.checks.finding import Severity, Site, User, version_of
from fmdeploy.jetson.checks.release import release_of
from fmdeploy.jetson.doctor import CHECKS, doctor, examine
from fmdeploy.jetson.jetpack import jetpack_of, table
from fmdeploy.jetson.preflight import import_problem
from support.fakeboard import (
    NANO_MODES,
    FakeBoard,
    agx_orin_jp72,
    bare_container,
    mixed_packages,
    orin_nano_jp62,
    pc,
    throttling_board,
)
from support.processes import FMDEPLOY

Found = dict[str, list[dict[str, Any]]]


def diagnose(board: FakeBoard) -> tuple[int, Found]:
    """Exit code, and the findings by check."""
    found = doctor(root=board.root)
    by_check: Found = {}
    for finding in found.data["findings"]:
        by_check.setdefault(finding["check"], []).append(finding)
        assert "could not finish" not in finding["what"]
        assert finding["fix"] or finding["severity"] == "ok", finding
    return found.exit_code, by_check


def severities(found: Found) -> dict[str, str]:
    return {name: "+".join(finding["severity"] for finding in findings) for name, findings in found.items()}


def test_a_good_orin_nano(tmp_path: Path) -> None:
    code, found = diagnose(orin_nano_jp62(tmp_path / "b"))
    assert code == 0
    assert {name: state for name, state in severities(found).items() if state != "ok"} == {
        "sm87": "unknown", "onnxruntime": "warn", "providers": "unknown"}
    texts = {name: findings[0]["what"] for name, findings in found.items()}
    assert texts["l4t"] == "Jetson Linux 36.4.4 on NVIDIA Jetson Orin Nano Developer Kit"
    assert texts["jetpack"].startswith("JetPack 6.2.1")
    assert texts["power-mode"].startswith("power mode 25W (id 1)")
    assert texts["dla"] == "no DLA: an Orin Nano has no DLA"
    assert "0=15W, 1=25W, 2=MAXN_SUPER" in found["power-mode"][0]["found"]
    assert "EMC 665600000" in found["clocks"][0]["found"]
    assert "oc3 (instantaneous over-current) 0" in found["over-current"][0]["found"]
    assert found["l4t-packages"][0]["what"] == "3 packages, all of 36.4.4", "the kernel's package counts in its own way"
    assert found["onnxruntime"][0]["found"] == "1.23.2"


def test_a_good_agx_orin(tmp_path: Path) -> None:
    code, found = diagnose(agx_orin_jp72(tmp_path / "b"))
    assert code == 0
    assert {name: state for name, state in severities(found).items() if state != "ok"} == {"providers": "unknown"}
    assert found["jetpack"][0]["what"].startswith("JetPack 7.2 ")
    assert found["dla"][0]["what"] == "no DLA: TensorRT 10.16.2.10 has no DLA: 10.7 is the last with it, 11.4.1 the next"
    assert found["docker"][0]["severity"] == "ok", "Docker 29, and this kernel has iptable_raw"


def test_a_container_without_its_mounts(tmp_path: Path) -> None:
    code, found = diagnose(bare_container(tmp_path / "b"))
    assert code == 1
    text = json.dumps(found)
    for needed in ("/etc/nv_tegra_release:ro", "--runtime nvidia", "--gpus does not work", "libnvdla_compiler.so", "/dev/nvmap"):
        assert needed in text
    assert severities(found)["container"] == "warn+fail+fail"


def test_a_jetpack_7_host_names_the_right_image(tmp_path: Path) -> None:
    board = bare_container(tmp_path / "b")
    board.write("proc/sys/kernel/osrelease", "6.8.12-1021-tegra\n")
    board.libraries("libcuda.so.1")
    _, found = diagnose(board)
    fixes = " ".join(finding["fix"] for finding in found["container"])
    assert "SBSA" in fixes
    board.libraries("nvidia/libnvdla_compiler.so")
    assert severities(diagnose(board)[1])["container"] == "warn"


def test_a_throttling_board(tmp_path: Path) -> None:
    code, found = diagnose(throttling_board(tmp_path / "b"))
    assert code == 1
    assert {name: state for name, state in severities(found).items() if name in ("temperatures", "throttling", "over-current")} == {
        "temperatures": "fail", "throttling": "fail", "over-current": "warn"}
    assert "27390" in found["over-current"][0]["found"]


def test_mixed_packages(tmp_path: Path) -> None:
    code, found = diagnose(mixed_packages(tmp_path / "b"))
    assert code == 1
    assert found["l4t-packages"][0]["what"] == ("packages of 2 releases are mixed: nvidia-l4t-firmware 36.4.7-20250918154033, "
                                                "nvidia-l4t-init 36.4.7-20250918154033")
    assert len(found["l4t-packages"][0]["found"].split(", ")) == 5, "every package is listed"


def test_a_pc(tmp_path: Path) -> None:
    code, found = diagnose(pc(tmp_path / "b"))
    assert code == 0
    assert "power-mode" not in found
    assert "no Jetson" in found["l4t"][0]["what"]


CHANGES: dict[str, tuple[Callable[[FakeBoard], object], str, str, str]] = {
    "old JetPack": (lambda b: b.release(35, "4.1"), "jetpack", "fail", "TensorRT 8.5"),
    "Thor only": (lambda b: b.release(38, "2.0"), "jetpack", "fail", "not for Orin"),
    "future": (lambda b: b.release(41, "0.0"), "jetpack", "unknown", "no table"),
    "old TensorRT": (lambda b: b.packages(libnvinfer8="8.6.2.3-1+cuda12.2"), "tensorrt", "fail", "too old"),
    "no sm_87": (lambda b: b.libraries("libnvinfer_builder_resource_sm90.so.10.13.3"), "sm87", "fail", "no kernels"),
    "known bad build": (lambda b: b.packages(libnvinfer10="10.13.3.9-1+cuda13.0"), "sm87", "warn", "known in builds"),
    "mode not taken": (lambda b: b.power(3, NANO_MODES, 6), "power-mode", "fail", "never took effect"),
    "nvpmodel hangs": (lambda b: b.program("nvpmodel", "exit 1", "usr/sbin"), "power-mode", "unknown", "ended with code 1"),
    "near its limit": (lambda b: b.tj(88.0), "temperatures", "warn", "7.0 °C below"),
    "tegrastats mute": (lambda b: b.program("tegrastats", "exit 0"), "tegrastats", "warn", "exited"),
    "tegrastats raves": (lambda b: b.program("tegrastats", "while :; do head -c 300 /dev/urandom; echo; sleep 0.05; done"),
                         "tegrastats", "warn", "garbage"),
    "little memory": (lambda b: b.memory(available_mib=600), "memory", "warn", "little"),
    "no memory": (lambda b: b.memory(available_mib=100), "memory", "fail", "little"),
    "swapped": (lambda b: b.memory(swap_free_mib=3000), "swap", "warn", "swapped out"),
    "no counters": (lambda b: b.write("sys/class/hwmon/hwmon3/name", "ina3221\n"), "over-current", "unknown", "soctherm_oc"),
    "new Docker": (lambda b: b.packages(docker_ce="5:28.3.2-1~ubuntu.22.04~jammy"), "docker", "warn", "iptable_raw"),
    "old Python": (lambda b: os.rename(b.root / "usr/bin/python3.10", b.root / "usr/bin/python3.8"), "python", "fail", "too old"),
    "GPU wheel": (lambda b: b.python("3.10", onnxruntime_gpu="1.31.1"), "onnxruntime", "warn+ok+warn", ""),
}


@pytest.mark.parametrize("case", CHANGES)
def test_every_check_trips_and_is_silent_without_its_fault(case: str, tmp_path: Path) -> None:
    change, check, severity, words = CHANGES[case]
    board = orin_nano_jp62(tmp_path / "b")
    before = {finding.check: finding for finding in examine(Site(board.root))}
    change(board)
    _, found = diagnose(board)
    assert severities(found)[check] == severity
    assert words in found[check][0]["what"]
    assert before[check].severity.value != severity


def test_device_files_and_groups(tmp_path: Path) -> None:
    board = orin_nano_jp62(tmp_path / "b")
    node = board.root / "dev/nvmap"
    node.chmod(0o660)
    os.chown(node, 0, 44) if os.geteuid() == 0 else None
    group = node.stat().st_gid
    owner = node.stat().st_uid
    stranger, member = User(owner + 65534, frozenset({group + 1})), User(owner + 65534, frozenset({group}))
    assert not may_open(node, stranger)
    assert may_open(node, member)
    assert may_open(node, User(0, frozenset()))
    found = [finding for finding in examine(Site(board.root, stranger)) if finding.check == "devices"]
    assert (found[0].severity.value, found[0].expected) == ("fail", f"member of group {group}")
    (board.root / ".dockerenv").touch()
    inside = [finding for finding in examine(Site(board.root, stranger)) if finding.check == "devices"]
    assert f"--group-add {group}" in inside[0].fix


@pytest.mark.parametrize(("board", "l4t", "tensorrt", "able"), [
    ("Jetson AGX Orin", "36.4.4", "10.3.0", True), ("Jetson Orin NX", "35.4.1", "8.5.2", True),
    ("Jetson Orin Nano", "36.4.4", "10.3.0", False), ("Jetson AGX Orin", "39.2.0", "10.16.2", False),
    ("Jetson AGX Orin", "39.2.1", "11.4.1", True), ("Jetson Orin NX", "39.2.1", "11.4.1", False),
    ("Jetson AGX Orin", "39.2.1", "11.3.0", False), ("Jetson AGX Orin", "36.4.4", "10.7.0", True),
    ("Jetson AGX Orin", "36.4.4", "10.8.0", False),
])
def test_dla_table(board: str, l4t: str, tensorrt: str, able: bool) -> None:
    found, reason = dla_support(board, l4t, tensorrt)
    assert found is able
    assert bool(reason) is not able


@pytest.mark.parametrize(("l4t", "label"), [("35.4.1", "5.1"), ("36.2", "6.0 DP"), ("36.3.0", "6.0"), ("36.4.2", "6.1"), ("36.4.3", "6.2"),
                                            ("36.4.7", "6.2.1"), ("36.5.0", "6.2.2"), ("38.4.0", "7.0 / 7.1"), ("39.2.0", "7.2"),
                                            ("39.2.3", "7.2.2 or later"), ("32.7.1", None)])
def test_jetpack_table(l4t: str, label: str | None) -> None:
    row = jetpack_of(l4t)
    assert (row.label if row else None) == label
    assert all(row.l4t_from <= row.l4t_to for row in table())
    assert all(one.l4t_to < other.l4t_from for one, other in zip(table(), table()[1:], strict=False))


def test_versions() -> None:
    assert version_of("5:28.3.2-1~ubuntu") == (28, 3, 2)
    assert version_of("x") == version_of(None) == ()
    assert [release_of(text) for text in ("36.4.4-20250616085344", "5.15.148-tegra-36.4.7-20250918154033", "1.0")] == [
        "36.4.4", "36.4.7", "1.0"]


def test_a_package_that_does_not_load_names_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_here.py").write_text("raise ImportError('libnvdla_compiler.so: cannot open shared object file: No such file')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "libnvdla_compiler.so is missing" in import_problem("broken_here")
    assert "SBSA" in import_problem("broken_here")


def test_on_the_command_line(tmp_path: Path) -> None:
    """Exit 0 here or 1, never a traceback; a fake board fails with 1; a folder that is none is bad usage."""
    bad = subprocess.run([*FMDEPLOY, "doctor", "--json", "--root", throttling_board(tmp_path / "b").root], capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stderr) == (1, "")
    data = json.loads(bad.stdout)
    assert (data["healthy"], data["jetson"], data["l4t"], data["counts"]["fail"]) == (False, True, "36.4.4", 2)
    assert {"check", "severity", "what", "expected", "found", "fix"} == set(data["findings"][0])
    here = subprocess.run([*FMDEPLOY, "doctor"], capture_output=True, text=True, check=False)
    assert here.returncode in (0, 1)
    assert "CPUExecutionProvider" in here.stdout
    assert here.stderr == ""
    with pytest.raises(ConfigError, match="is no folder"):
        doctor(root=tmp_path / "nothing")


@pytest.mark.parametrize("name", ["etc/nv_tegra_release", "proc/meminfo", "var/lib/dpkg/status", "etc/nvpmodel.conf", "var/lib/nvpmodel/status",
                                  "usr/local/cuda/version.json", "proc/device-tree/model"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x80" * 50, b"# R36 (release), REVISION: ", b"Package: \nVersion: \n\n\n", b"[1, 2"])
def test_damaged_files_never_stop_it(name: str, content: bytes, tmp_path: Path) -> None:
    board = orin_nano_jp62(tmp_path / "b")
    board.program("tegrastats", "exit 0")
    board.write(name, content)
    diagnose(board)


def test_the_documentation_lists_every_check(root: Path) -> None:
    """One row a check, in the order of the program."""
    text = (root / "docs/doctor.md").read_text()
    assert re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE) == [check.name for check in CHECKS]
    for name, check in CHECKS:
        meaning = (check.__doc__ or "").split("\n")[0].rstrip(".")
        assert meaning in text, f"docs/doctor.md does not say of {name}: {meaning}"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["proc/meminfo", "etc/nv_tegra_release", "sys/class/thermal/thermal_zone8/temp", "var/lib/nvpmodel/status"])
@pytest.mark.parametrize("how", ["gone", "folder", "FIFO", "junk"])
def test_files_that_are_none_hide_no_other_finding(name: str, how: str, tmp_path: Path) -> None:
    board = orin_nano_jp62(tmp_path / "board")
    path = board.root / name
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "FIFO":
        os.mkfifo(path)
    elif how == "junk":
        path.write_bytes(b"\xff\x00" * 500)
    found = examine(Site(board.root, User(65534, frozenset({65534}))))
    assert {"power-mode", "memory", "temperatures", "python"} <= {one.check for one in found}
    assert [one for one in found if one.severity is not Severity.OK and not one.fix] == []
    assert [one for one in found if "could not finish" in one.what] == []
