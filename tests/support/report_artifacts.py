"""One artifact of every kind that the report reads, real in format: synthetic scenes, and models that are the truth plus
a known amount of noise, so that the order of their scores is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fmdeploy.artifact import Artifact
from fmdeploy.config import StageConfig
from fmdeploy.data.format import open_dataset
from fmdeploy.data.highway import SCENARIOS
from fmdeploy.data.writer import DatasetWriter
from fmdeploy.draft import Draft, produce
from fmdeploy.evaluate.evaluation import evaluate
from fmdeploy.evaluate.examples import save_examples
from fmdeploy.evaluate.gates import Result, Row
from fmdeploy.manifest import Kind
from fmdeploy.task import Arrays, Samples, Task, load_task

NOISE = {"teacher": 1.8, "student": 2.0, "int8": 2.02, "scratch": 2.6}
WEATHERS = ("clear", "rain", "fog", "night")
FRAMES = 24
Grid = np.ndarray[Any, Any]


class SupportConfig(StageConfig):
    """The configuration of a made-up stage."""

    task: str = "bev-occupancy"
    name: str = ""
    seed: int = 0


def make(out: Path, kind: Kind, inputs: Mapping[str, Artifact], build: Any, name: str = "") -> Artifact:
    """Seal one artifact."""
    stage = {"DATASET": "data record", "TEACHER": "teacher train"}.get(kind.value, kind.value.lower())
    return produce(out, kind, stage=stage, config=SupportConfig(name=name), inputs=inputs, build=build)


def dataset(out: Path, sequences: int = 24) -> Artifact:
    """Boxes that drive straight on, seen by noisy sensors."""

    def build(draft: Draft) -> None:
        writer = DatasetWriter(draft)
        names = [f"s{k:03d}" for k in range(sequences)]
        for k, name in enumerate(names):
            meta = {"scenario": SCENARIOS[k % 8], "weather": WEATHERS[k % 4], "simulation": f"sim{k // 2}", "seed": k}
            writer.add(name, _scene(np.random.default_rng(k), fog=k % 4 == 2), meta)
        cut = sequences // 3
        writer.close({"train": names[2 * cut :], "val": names[cut : cut + 2], "test": names[:cut]})

    return make(out, Kind.DATASET, {}, build)


def _scene(rng: np.random.Generator, *, fog: bool) -> dict[str, Grid]:
    occupied = np.zeros((FRAMES, 64, 64), bool)
    for _ in range(6):
        column, row, speed = rng.integers(20, 44), rng.integers(-20, 60), rng.uniform(-1.5, 1.5)
        for t in range(FRAMES):
            top = int(row + speed * t)
            occupied[t, max(top, 0) : max(top + 5, 0), column : column + 2] = True
    road = np.zeros_like(occupied)
    road[:, :, 18:46] = True
    seen = occupied & (rng.random(occupied.shape) < (0.3 if fog else 0.8))
    planes = {"lidar_hit": seen, "lidar_free": road & ~occupied, "camera_vehicle": seen, "camera_drivable": road,
              "camera_line": road & (np.arange(64) % 7 == 0), "occupancy": occupied, "drivable": road}
    packed = {name: np.packbits(plane.reshape(FRAMES, -1), axis=1) for name, plane in planes.items()}
    rare = np.zeros(FRAMES, bool)
    rare[10:14] = True
    return {**packed, "ttc": np.full(FRAMES, 9.0, np.float32), "rare_cut_in": rare, "rare_near_collision": ~rare & False}


class Noisy:
    """Predicts the truth of the samples, in order, through noise."""

    def __init__(self, samples: Samples, noise: float, *, only: Grid | None = None) -> None:
        self.samples, self.noise, self.next = samples, noise, 0
        self.order = np.arange(len(samples)) if only is None else only

    def __call__(self, inputs: Arrays) -> Arrays:
        count = len(next(iter(inputs.values())))
        index = self.order[self.next : self.next + count]
        self.next += count
        _, targets = self.samples.batch(index)
        rng = np.random.default_rng(int(index[0]))
        bev = targets["bev"].astype(np.float32) * 8 - 4
        scene = np.eye(8, dtype=np.float32)[targets["scene"]] * 3
        return {"bev": (bev + self.noise * rng.normal(size=bev.shape)).astype(np.float32),
                "scene": (scene + self.noise * rng.normal(size=scene.shape)).astype(np.float32)}


def write_model(draft: Draft, task: Task, data: Artifact, who: str, suffix: str = "") -> None:
    """An evaluation and example outputs on the test split."""
    from fmdeploy.evaluate.examples import choose

    samples = task.samples(open_dataset(data.root), "test")
    found = evaluate(Noisy(samples, NOISE[who]), samples, task.metrics(), data=f"{data.digest}:test")
    found.save(draft, f"evaluation{suffix}")
    save_examples(draft, Noisy(samples, NOISE[who], only=choose(samples)), samples, name=f"examples{suffix}")


def network(out: Path, kind: Kind, who: str, data: Artifact, teacher: Artifact | None, params: int) -> Artifact:
    """A TEACHER or STUDENT without weights."""
    fraction = 1.0 if kind is Kind.TEACHER else 0.1
    steps = np.arange(200)
    loss = 2.0 * np.exp(-steps / 60) + 0.4 + 0.05 * np.random.default_rng(1).normal(size=200)

    def build(draft: Draft) -> None:
        draft.write_json("metrics.json", {"params": params, "labels": {"fraction": fraction, "samples": 57, "of": 570}})
        curve = [[int(s), float(v)] for s, v in zip(steps, loss, strict=True)]
        half = [[s, v / 2] for s, v in curve]
        draft.note(training={"steps": 200, "steps_per_s": 2.75, "data_wait_share": 0.0371, "processes": 2, "sharding": "none"})
        draft.write_json("curve.json", {"loss": curve, "loss.hard": half, "loss.soft": half, "lr": half})
        write_model(draft, load_task("bev-occupancy"), data, who)

    return make(out, kind, {"data": data, **({"teacher": teacher} if teacher else {})}, build, who)


def rows(result: Result = Result.PASS) -> list[Row]:
    """Overall gates and two slices; `result` is that of the INT8 drop."""
    value = {Result.PASS: 0.004, Result.FAIL: 0.02, Result.NOT_MEASURED: None}[result]
    return [
        Row("int8-cpu drop vs fp32", result, value, 0.01, "1", (0.001, 0.007) if value else None, None, 1410, True,
            "" if result is Result.PASS else "drop 0.0200 > 0.0100"),
        Row("p50 latency", Result.PASS, 1.73, 10.0, "ms", n_samples=300),
        Row("int8-cpu drop vs fp32", Result.PASS, 0.006, 0.03, "1", (0.001, 0.02), "weather=fog", 300),
        Row("int8-cpu drop vs fp32", Result.NOT_MEASURED, None, 0.03, "1", None, "rare", 40, False,
            "40 samples, 100 needed"),
    ]


LAYER = {"name": "/stem/Conv_myl0_1", "kind": "correlation", "compute": True, "precision": "INT8", "inputs": ["INT8"],
         "weights": ["INT8", "FP32"], "outputs": ["FP16"], "nodes": ["/stem/<Conv>"]}
COMPILED = {"api": "tensorrt-rtx", "version": "1.7.1.116", "proves": "It compiles.", "not_proven": "Nothing was run.",
            "files": {"int8": {"engine_bytes": 2 * 2**20, "counts": {"FP16": 2, "INT8": 11}, "layers": [LAYER]}}}


TROUBLE: dict[str, Any] = {
    "metric": "iou", "tier": "int8-cpu", "deadline_ms": 300.0, "hz": 5.0, "data": "d:test",
    "rows": [
        {"fault": "clean", "level": "", "frames": 120, "valid": 1.0, "reasons": {}, "value_unguarded": 0.37,
         "drop_unguarded": 0.0, "value_valid": 0.37, "clean_valid": 0.37, "drop_valid": 0.0, "interval": [0.0, 0.0],
         "groups": 8},
        {"fault": "NaN", "level": "1% of the values", "frames": 120, "valid": 0.0, "reasons": {"NOT_FINITE": 1.0},
         "value_unguarded": 0.36, "drop_unguarded": 0.02, "value_valid": None, "clean_valid": None, "drop_valid": None,
         "interval": None, "groups": 0},
    ],
}


def troubled(draft: Draft) -> None:
    """What `evaluate` writes."""
    draft.write_json("trouble.json", TROUBLE)
    draft.write_json("metrics.json", {})


def pipeline(root: Path, gates: Result = Result.PASS) -> dict[str, Artifact]:
    """Role → artifact, of a whole pipeline."""
    data = dataset(root / "data")
    teacher = network(root / "teacher", Kind.TEACHER, "teacher", data, None, 1_940_000)
    student = network(root / "student", Kind.STUDENT, "student", data, teacher, 137_000)
    scratch = network(root / "scratch", Kind.STUDENT, "scratch", data, None, 137_000)

    def models(draft: Draft) -> None:
        for variant, size in (("fp32", 560_000), ("int8", 170_000), ("int8-cpu", 150_000)):
            draft.path(f"model.{variant}.onnx").write_bytes(bytes(size))
        draft.write_json("metrics.json", {})
        draft.write_json("tensorrt.json", COMPILED)

    bundle = make(root / "bundle", Kind.BUNDLE, {"student": student, "data": data}, models)

    def measured(draft: Draft) -> None:
        draft.write_json("gates.json", [row.to_json() for row in rows(gates)])
        rng = np.random.default_rng(0)
        times = {name: {"ms": list(scale * (1 + rng.gamma(1.0, 0.08, 400))), "threads": 1}
                 for name, scale in (("int8-cpu", 1.7), ("fp32", 5.6))}
        draft.write_json("latency.json", times)
        draft.write_json("check.json", {"notes": ["int8-cpu is preferred: 3.28 [3.21, 3.34] times as fast as fp32"],
                                        "speedup": {"int8-cpu": {"value": 3.28, "low": 3.21, "high": 3.34}}})
        draft.write_json("metrics.json", {})
        write_model(draft, load_task("bev-occupancy"), data, "int8", ".int8-cpu")

    check = make(root / "check", Kind.CHECK, {"bundle": bundle, "data": data}, measured)
    trouble = make(root / "trouble", Kind.EVALUATION, {"bundle": bundle, "data": data}, troubled)
    return {"trouble": trouble, "data": data, "teacher": teacher, "student": student, "scratch": scratch, "bundle": bundle, "check": check}
