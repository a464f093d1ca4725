from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fmdeploy.artifact import Artifact
from fmdeploy.config import StageConfig
from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.draft import Draft, produce
from fmdeploy.evaluate.report.origins import event_rows, origin_rows
from fmdeploy.evaluate.report.sources import Sources
from fmdeploy.manifest import Kind


def sources(data: Any = None, artifacts: tuple[Artifact, ...] = ()) -> Sources:
    return Sources(artifacts, None, data, (), None, (), datasets=() if data is None else (data,))


def test_maps_rigs_and_days_are_listed_by_side() -> None:
    rig = {"CAM_FRONT": {"modality": "camera"}, "LIDAR_TOP": {"modality": "lidar"}}
    infos = tuple(SequenceInfo(f"s{k}", "x", 4, {"map_version": "v1" if k < 3 else "v2", "sensor_rig": "n8", "rig": rig,
                                                 "date": f"2026-03-{k + 1:02d}"}) for k in range(4))
    data = SimpleNamespace(sequences=infos, splits={"train": ("s0", "s1"), "val": ("s2",), "test": ("s3",)})
    rows = {row.key: row for row in origin_rows(sources(data))}
    assert (rows["map_version"].train, rows["map_version"].held_out) == ("v1 (2)", "v1 (1), v2 (1)")
    assert rows["sensor_rig"].train == "n8 (2)"
    assert rows["rig n8"].train == "CAM_FRONT, LIDAR_TOP"
    assert "weather" not in rows
    assert origin_rows(sources()) == []


def test_guards_of_models_are_listed_with_their_verdict(tmp_path: Path) -> None:
    events = {"t": {"value": 1.02, "low": 0.97, "high": 1.08, "predicted": 0.0163, "observed": 0.016, "trusted": True},
              "+1.6s": {"value": 1.9, "low": 1.7, "high": 2.1, "predicted": 0.03, "observed": 0.016, "trusted": False},
              "never": {"value": None, "low": None, "high": None, "predicted": 0.0, "observed": 0.0, "trusted": None}}

    def build(draft: Draft) -> None:
        draft.write_json("calibration_guard.json", {"errors": {}, "events": events, "guard": "fail"})

    made = produce(tmp_path / "teacher", Kind.TEACHER, stage="test", config=StageConfig(), inputs={}, build=build)
    rows = event_rows(sources(artifacts=(made,)))
    assert [(row.model, row.event, row.verdict) for row in rows] == [
        ("teacher", "+1.6s", "not calibrated"), ("teacher", "never", "not measured"), ("teacher", "t", "trusted")]
    assert rows[2].ratio == "1.02 [0.97, 1.08]"
    assert rows[1].ratio == "– [–, –]"
