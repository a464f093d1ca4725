"""The digits example, run as its README says: a user's own data and networks down to a bundle that passes its gates."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fmdeploy.artifact import open_artifact
from fmdeploy.evaluate.gates import Row, gates_pass
from fmdeploy.manifest import Kind
from support.markdown import shell_blocks

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "digits" / "digits.py"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the example wrote."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "examples").symlink_to(ROOT / "examples")
    [block] = shell_blocks(ROOT / "examples" / "digits" / "README.md")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.script], text=True, capture_output=True, check=False,
                          cwd=folder, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    return folder / "out" / "digits"


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def test_student_learns_from_the_teacher(digits: Path) -> None:
    teacher, student, scratch = (metrics(digits / name) for name in ("teacher", "student", "scratch"))
    assert teacher["test"]["accuracy"] >= 0.98
    assert student["test"]["accuracy"] >= 0.96
    assert student["test"]["accuracy"] >= scratch["test"]["accuracy"] + 0.03, "what distillation is for"
    assert student["labels"] == {"fraction": 0.1, "samples": 90, "of": 900}
    assert student["params"] * 20 <= teacher["params"]


def test_int8_keeps_the_accuracy(digits: Path) -> None:
    values = json.loads((digits / "check" / "check.json").read_text())["values"]
    drop = 1 - values["int8-cpu"]["accuracy"] / values["fp32"]["accuracy"]
    assert drop <= 0.01
    assert values["int8-cpu"]["accuracy"] >= 0.93


def test_residual_add_of_a_plain_module_is_quantised(digits: Path) -> None:
    placement = metrics(digits / "quantized")["placement"]
    assert placement["method"] == "fx"
    assert placement["adds"] == 1
    fused = metrics(digits / "bundle")["variants"]["int8-cpu"]["fused"]
    assert (fused["int8_convs"], fused["int8_adds"], fused["float_convs"], fused["float_adds"]) == (3, 1, 0, 0)


def test_bundle_passes_its_gates_and_the_report_shows_it(digits: Path) -> None:
    check = open_artifact(digits / "check", Kind.CHECK)
    assert gates_pass(Row.from_json(raw) for raw in check.json("gates.json"))
    text = (digits / "report.html").read_text()
    assert 'class="verdict pass"' in text
    assert open_artifact(digits / "bundle", Kind.BUNDLE).digest in text


def test_example_is_short_and_its_networks_are_plain() -> None:
    source = SCRIPT.read_text()
    assert len(source.splitlines()) < 80
    networks = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name in ("Residual", "Network")]
    assert len(networks) == 2
    for network in networks:
        assert "fmdeploy" not in ast.unparse(network)
        assert ast.unparse(network.bases[0]) == "nn.Module"
