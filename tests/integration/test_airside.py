"""The airside chapter at its fast size: every step runs, and the gate tells who forgot the road."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fmdeploy.artifact import open_artifact
from fmdeploy.data.format import open_dataset
from fmdeploy.evaluate.gates import Row, gates_pass
from fmdeploy.manifest import Kind

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "airside" / "airside.py"
README = ROOT / "examples" / "airside" / "README.md"
RECORD = ROOT / "examples" / "airside" / "record.json"


@pytest.fixture(scope="module")
def chapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the example wrote."""
    out = tmp_path_factory.mktemp("airside") / "out"
    done = subprocess.run([sys.executable, SCRIPT, out, "--fast"], text=True, capture_output=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "| kept student, INT8 |" in done.stdout
    return out


def read(path: Path) -> Any:
    """JSON of a file."""
    return json.loads(path.read_text())


def test_domains_are_apart_and_say_what_they_are(chapter: Path) -> None:
    road, airside = open_dataset(chapter / "road"), open_dataset(chapter / "airside")
    assert not {s.group for s in road.sequences} & {s.group for s in airside.sequences}
    assert {s.metadata["sensor_rig"] for s in airside.sequences} == {"bumper-1"}
    assert not {s.metadata["weather"] for s in road.sequences} & {s.metadata["weather"] for s in airside.sequences}
    both = open_dataset(chapter / "both")
    assert len(both.sequences) == len(road.sequences) + len(airside.sequences)


def test_adapter_is_small_and_used_few_labels(chapter: Path) -> None:
    found = read(chapter / "adapter" / "metrics.json")
    assert found["labels"]["samples"] <= 0.3 * found["labels"]["of"]
    assert found["trained"] < 0.2 * found["params"]
    adapted = open_artifact(chapter / "adapted", Kind.TEACHER)
    assert {parent.kind for parent in adapted.inputs.values()} == {Kind.TEACHER, Kind.ADAPTER}


def test_gate_blocks_the_one_that_forgot_the_road(chapter: Path) -> None:
    def verdict(name: str) -> dict[str, bool]:
        rows = read(chapter / name / "gates.json")
        return {row["name"]: row["result"] == "pass" for row in rows if row["slice"] is None}

    forgot, kept = verdict("gate-naive"), verdict("gate-kept")
    road = next(name for name in forgot if name.endswith("in road"))
    assert not forgot[road]
    assert kept[road]
    lost = {name: read(chapter / name / "check.json")["continual"]["mean_forgetting"]
            for name in ("gate-naive", "gate-kept")}
    assert lost["gate-naive"] > lost["gate-kept"] + 0.05


def test_int8_candidate_passes_every_gate(chapter: Path) -> None:
    for name in ("gate-int8", "check"):
        gates = open_artifact(chapter / name, Kind.CHECK).json("gates.json")
        assert gates_pass(Row.from_json(raw) for raw in gates)


def test_no_label_of_the_apron_reached_a_student(chapter: Path) -> None:
    for name in ("deployed", "naive", "kept"):
        assert read(chapter / name / "metrics.json")["labels"]["samples"] == 0


def test_readme_shows_the_recorded_numbers() -> None:
    text, record = README.read_text(), read(RECORD)
    assert ("--fast`" in text.split("## What came out")[1]) == (record["size"] == "fast")
    for model, iou in record["values"].items():
        assert f"| {model} | {iou['road']:.3f} | {iou['airside']:.3f} |" in text
