"""What a run of the demo came to: `summary.json` and the lines on the screen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmdeploy.artifact import Artifact
from fmdeploy.data.format import open_dataset
from fmdeploy.evaluate.baselines import evaluate_baselines
from fmdeploy.evaluate.bootstrap import Interval, drop
from fmdeploy.evaluate.evaluation import Evaluation
from fmdeploy.evaluate.gates import Row, gates_pass
from fmdeploy.runtime.bundle import open_bundle
from fmdeploy.runtime.measure.bench import start_tiers
from fmdeploy.runtime.measure.latency import golden_frames, measure_overhead
from fmdeploy.task import Metric, Task, load_task

SERVED = "int8-cpu"
OVERHEAD_RUNS = 300
MIN_SLICE_SAMPLES = 30  # fewer say nothing at all; the gates ask for more


def summarise(made: Mapping[str, Artifact], task_name: str = "bev-occupancy") -> dict[str, Any]:
    """All numbers of a finished demo; `made` maps folder names to artifacts."""
    task = load_task(task_name)
    metric = task.metrics()[0]
    models = {name: _model(made[name]) for name in ("teacher", "student", "student_scratch")}
    checked = made["check"].json("check.json")
    rows = [Row.from_json(raw) for raw in made["check"].json("gates.json")]
    evaluations = {name: Evaluation.load(made[name], "evaluation") for name in models}
    return {
        **models,
        "int8": _int8(made["quantized"], made["bundle"], metric),
        "int8_cpu": {"iou": checked["values"].get(SERVED, {}).get(metric.name)},
        "baselines": _baselines(made["data"], task),
        "retention": _ratio(models["student"][metric.name], models["teacher"][metric.name]),
        "distillation_gain": _plain(drop(evaluations["student_scratch"], evaluations["student"], metric,
                                         relative=False), sign=-1),
        **_int8_drop(made["check"], metric),
        "latency": _latency(made["bundle"], checked),
        "preferred": checked["preferred"],
        "gates": [_gate(row) for row in rows],
        "passed": gates_pass(rows),
    }


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _model(artifact: Artifact) -> dict[str, Any]:
    metrics = artifact.json("metrics.json")
    return {"params": metrics["params"], "labels": metrics["labels"], **metrics["test"]}


def _int8(quantized: Artifact, bundle: Artifact, metric: Metric) -> dict[str, Any]:
    """The TensorRT dialect: scored as fake-quantised torch, and how well `model.int8.onnx` agrees with that."""
    parity = bundle.json("metrics.json")["variants"]["int8"]["parity"]
    return {metric.name: quantized.json("metrics.json")["test"][metric.name], "sqnr_to_onnx_db": parity["sqnr_db"]}


def _baselines(data: Artifact, task: Task) -> dict[str, float]:
    """What copying the sensors scores: a network must beat it."""
    metric = task.metrics()[0]
    found = evaluate_baselines(task, task.samples(open_dataset(data.root), "test"))
    return {name: evaluation.value(metric) for name, evaluation in found.items()}


def _int8_drop(check: Artifact, metric: Metric) -> dict[str, Any]:
    """INT8 against the FP32 student: the relative drop overall, and in the worst of the large enough slices."""
    if not (check.has(f"evaluation.{SERVED}.json") and check.has("evaluation.fp32.json")):
        return {"int8_drop": None, "int8_drop_interval": None, "worst_slice_drop": None, "worst_slice": None}
    before, after = Evaluation.load(check, "evaluation.fp32"), Evaluation.load(check, f"evaluation.{SERVED}")
    interval = drop(before, after, metric)
    masks = after.masks()
    drops = {name: drop(before, after, metric, mask=mask) for name, mask in masks.items()
             if int(mask.sum()) >= MIN_SLICE_SAMPLES}
    finite = {name: found.value for name, found in drops.items() if math.isfinite(found.value)}
    worst = max(finite, key=lambda name: finite[name], default=None)
    return {"int8_drop": interval.value, "int8_drop_interval": [interval.low, interval.high],
            "worst_slice_drop": finite[worst] if worst else None, "worst_slice": worst,
            "slices_measured": len(finite), "slices_too_small": len(masks) - len(drops)}


def _latency(bundle: Artifact, checked: Mapping[str, Any]) -> dict[str, Any]:
    """Medians of the interleaved runs of the check, and the cost of the guards."""
    tiers, ratio = checked["latency"], checked["speedup"].get(SERVED)
    overhead = _overhead(bundle)
    return {
        "fp32_ms": tiers.get("fp32", {}).get("p50_ms"),
        "int8_cpu_ms": tiers.get(SERVED, {}).get("p50_ms"),
        "speedup": ratio["value"] if ratio else None,
        "speedup_interval": [ratio["low"], ratio["high"]] if ratio else None,
        "runtime_overhead_us": overhead.get("overhead_us"),
        "runtime_overhead_control_us": overhead.get("control_us"),
        "threads": 1,
    }


def _overhead(bundle: Artifact) -> dict[str, Any]:
    """The only number that the check did not measure; empty where the tier does not run here."""
    opened = open_bundle(bundle.root)
    runtimes, _ = start_tiers((SERVED,), opened, threads=1)
    return {} if SERVED not in runtimes else measure_overhead(runtimes[SERVED], golden_frames(opened), OVERHEAD_RUNS)


def _plain(interval: Interval, *, sign: int) -> dict[str, Any]:
    ends = sorted((sign * interval.low, sign * interval.high))
    finite = all(math.isfinite(end) for end in ends)
    return {"value": sign * interval.value, "low": ends[0] if finite else None, "high": ends[1] if finite else None,
            "n_samples": interval.n_samples, "n_groups": interval.n_groups}


def _gate(row: Row) -> dict[str, Any]:
    kept = row.to_json()
    return {"name": row.title, **{key: kept[key] for key in ("result", "value", "limit", "interval", "unit", "reason",
                                                             "required")}}


def summary_lines(summary: Mapping[str, Any], out: Path) -> tuple[str, ...]:
    """The result in a dozen lines."""
    gain, latency = summary["distillation_gain"], summary["latency"]
    interval = "" if gain["low"] is None else f" [{gain['low']:+.4f}, {gain['high']:+.4f}]"
    students = (f"{name:16} IoU {summary[name]['iou']:.4f}   {summary[name]['params']:,} parameters, "
                f"{summary[name]['labels']['samples']} labelled samples"
                for name in ("teacher", "student", "student_scratch"))
    copies = (f"{name:16} IoU {value:.4f}" for name, value in summary["baselines"].items())
    failed = [gate for gate in summary["gates"] if gate["required"] and gate["result"] != "pass"]
    return (
        *students, *copies,
        f"retention {_show(summary['retention'])}; distilled minus scratch {gain['value']:+.4f}{interval}",
        f"INT8 (CPU) IoU {_show(summary['int8_cpu']['iou'])}, drop {_percent(summary['int8_drop'])}, "
        f"worst slice {_percent(summary['worst_slice_drop'])} ({summary['worst_slice']})",
        f"latency FP32 {_show(latency['fp32_ms'])} ms, INT8 {_show(latency['int8_cpu_ms'])} ms: "
        f"{_show(latency['speedup'])} times as fast; guards cost {_show(latency['runtime_overhead_us'])} us",
        f"{len(summary['gates'])} gates, {len(failed)} not passed: {'PASSED' if summary['passed'] else 'NOT PASSED'}",
        *(f"  {gate['result']}: {gate['name']} ({gate['reason']})" for gate in failed),
        *(("toy sizes: that it runs is proven, the accuracies above mean nothing",) if summary["fast"] else ()),
        f"{sum(summary['seconds'].values()):.0f} s; report at {out / 'report.html'}",
    )


def _show(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.2f} %"
