"""The report says how often each guard spoke on clean frames, silent guards included."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmdeploy.artifact import open_artifact
from fmdeploy.draft import Draft
from fmdeploy.evaluate.report import report
from fmdeploy.evaluate.report.alarms import GUARDS, alarm_rows
from fmdeploy.evaluate.report.sources import Sources, gather
from fmdeploy.manifest import Kind
from support.report_artifacts import make

TIERS = {"fp32": {"admitted": True, "flags": {"UNUSUAL_INPUT": 3, "SENSOR_MODE": 1}},
         "int8-cpu": {"admitted": True, "flags": {}}, "trt-int8": {"admitted": False, "flags": {}}}


def checked(root: Path, frames: int | None) -> Path:
    """A CHECK with two evaluated tiers and one that was refused."""
    def build(draft: Draft) -> None:
        draft.write_json("gates.json", [])
        draft.write_json("check.json", {"notes": [], "speedup": {}, "tiers": TIERS})
        draft.write_json("metrics.json", {} if frames is None else {"samples": frames})

    return make(root, Kind.CHECK, {}, build).root


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return gather([open_artifact(checked(tmp_path / "check", 200))])


def test_every_guard_of_every_evaluated_tier_has_a_row(sources: Sources) -> None:
    rows = {(row.tier, row.guard): row for row in alarm_rows(sources)}
    assert len(rows) == 2 * len(GUARDS) + 1
    assert {tier for tier, _ in rows} == {"fp32", "int8-cpu"}
    assert (rows["fp32", "UNUSUAL_INPUT"].alarms, rows["fp32", "UNUSUAL_INPUT"].share) == (3, 0.015)
    assert rows["fp32", "SENSOR_MODE"].alarms == 1, "what nobody expected is shown, too"
    assert rows["int8-cpu", "NOT_FINITE"].alarms == 0


def test_without_a_number_of_frames_there_is_no_rate(tmp_path: Path) -> None:
    assert alarm_rows(gather([open_artifact(checked(tmp_path / "check", None))])) == []


def test_the_page_shows_the_table(tmp_path: Path) -> None:
    report(artifacts=[str(checked(tmp_path / "check", 200))], out=str(tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    assert "False alarms of the guards" in text
    assert '<th scope="row">fp32</th><td>UNUSUAL_INPUT</td><td class="n">3</td><td class="n">200</td>' in text
    assert "1.50 %" in text
