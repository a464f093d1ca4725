"""Rungs by name, in the order of the table."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from fmdeploy.errors import ConfigError
from fmdeploy.teacher.probe.base import Rung

HERE = "fmdeploy.teacher.probe"
RUNGS = {
    "outputs": "outputs:Outputs",
    "linear": "linear:Linear",
    "knn": "knn:Knn",
    "segmentation": "dense:Segmentation",
    "occupancy": "dense:Occupancy",
    "forecasting": "dense:Forecasting",
    "transfer": "transfer:Transfer",
    "retrieval": "retrieval:Retrieval",
    "few-shot": "fewshot:FewShot",
    "few-shot-5": "fewshot:FewShotFive",
    "world-one-step": "worldmodel:OneStep",
    "world-multi-step": "worldmodel:MultiStep",
    "world-actions": "worldmodel:ActionSensitivity",
    "world-calibration": "worldmodel:FutureCalibration",
    "world-planning": "worldmodel:PlanningCost",
    "latency-p50": "deployment:LatencyMedian",
    "latency-p99": "deployment:LatencyTail",
    "memory": "deployment:Memory",
    "int8-drop": "deployment:Int8Drop",
}


def rungs_of(wanted: Sequence[str]) -> tuple[Rung, ...]:
    """The rungs called `wanted`, in the order of the table; all but the optional ones where nothing is wanted.

    Raises:
        ConfigError: there is no such rung.
    """
    if unknown := [name for name in wanted if name not in RUNGS]:
        raise ConfigError("no such rung", where=f"rungs {unknown[0]!r}", expected=", ".join(RUNGS))
    found = [_made(target) for name, target in RUNGS.items() if not wanted or name in wanted]
    return tuple(rung for rung in found if wanted or not rung.optional)


def _made(target: str) -> Rung:
    module, _, attribute = target.partition(":")
    kind: type[Rung] = getattr(importlib.import_module(f"{HERE}.{module}"), attribute)
    return kind()
