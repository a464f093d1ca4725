"""`fmdeploy evaluate`: accuracy and validity of a bundle when sensors fail, one row a fault.

    trouble.json               one object a fault: share valid, reasons, metric with and without the runtime
    trouble.safetensors        per-sample statistics of every fault, and which samples were published as valid

Legend: N judged samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath, OutputPath, Positional, RequiredKey, RunOnly, StageConfig
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ArtifactError, DataError
from fmdeploy.evaluate.evaluation import Evaluation, data_key
from fmdeploy.manifest import Kind
from fmdeploy.progress import progress
from fmdeploy.runtime.bundle import Bundle, open_bundle
from fmdeploy.runtime.guards.content import GuardConfig
from fmdeploy.runtime.run import task_name
from fmdeploy.runtime.session import Runtime
from fmdeploy.runtime.tiers import TIERS
from fmdeploy.runtime.trouble.faults import ONSET, Fault, faults_of
from fmdeploy.runtime.trouble.judge import POLICY, Judge, Judged, StreamClock
from fmdeploy.runtime.trouble.rows import outcome_lines, trouble_rows
from fmdeploy.runtime.trouble.streams import Stream, frames_of, streams_of
from fmdeploy.task import Samples, Task, load_task

STATS = "trouble"


class EvaluateConfig(StageConfig):
    """Options of `fmdeploy evaluate`."""

    bundle: Annotated[InputPath, Positional()] = Field(description="Folder of a BUNDLE")
    data: InputPath = Field(description="Folder of a DATASET of sequences")
    out: OutputPath = Field(description="Folder of the EVALUATION to write")
    split: str = Field(default="test", description="Split to evaluate on")
    task: str = Field(default="", description="Task that reads the dataset; default: the bundle's")
    tiers: tuple[str, ...] = Field(default=TIERS, min_length=1, description="Tiers to try, best first")
    threads: Annotated[int, RunOnly()] = Field(default=1, ge=1, le=256, description="Threads inside one run")
    sequences: int | None = Field(default=None, ge=1, description="Judge so many sequences; default: all")
    hz: float = Field(default=5.0, gt=0, description="Frames a second of the recordings")
    deadline_ms: float = Field(default=300.0, gt=0, description="Age at which a frame is worthless")
    frozen_after: int = Field(default=3, ge=1, description="Repetitions of the same bytes that make a sensor frozen")
    seed: int = Field(default=0, ge=0, description="Of the faults' random numbers")
    require_signature: RequiredKey = None


@command(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> Outcome:
    """Judge a bundle with sensors that fail: dropout, noise, fog, frozen, late and broken frames.

    Every fault is played through the runtime as a stream, from the fourth frame of each sequence on. Beside what the
    runtime publishes as valid stands what the network would have said with nobody looking.
    """
    bundle = open_bundle(config.bundle, require_signature=config.require_signature)
    data = open_dataset(config.data)
    name = task_name(bundle, config.task)
    task = load_task(name)
    if task.io.digest != bundle.io.digest:
        raise ArtifactError("has other inputs and outputs than the task", where=bundle.artifact.root,
                            expected=f"io of task {task.name}", fix="Name the right --task")
    resolved = config.model_copy(update={"task": name})

    def build(draft: Draft) -> None:
        _write(draft, resolved, bundle, data, task)

    inputs = {"bundle": bundle.artifact, "data": data.artifact}
    made = produce(config.out, Kind.EVALUATION, stage="evaluate", config=resolved, inputs=inputs, build=build)
    found = made.json("trouble.json")
    told = {"kind": made.kind.value, "path": str(made.root), "digest": made.digest, **found}
    lines = (*outcome_lines(found), bundle.signature.note(), f"EVALUATION {made.digest[:12]} at {made.root}")
    return Outcome(lines, told)


def _write(draft: Draft, config: EvaluateConfig, bundle: Bundle, data: Dataset, task: Task) -> None:
    samples = task.samples(data, config.split)
    streams = streams_of(samples, config.sequences)
    if not streams:
        raise DataError("there is no stream to judge", where=config.data,
                        expected=f"sequences of more than {ONSET} samples",
                        fix="Single images have no time: use fmdeploy check")
    clock = StreamClock()
    guards = GuardConfig(frozen_after=config.frozen_after)
    runtime = Runtime(bundle, tiers=config.tiers, threads=config.threads, guards=guards,
                      deadline_ms=config.deadline_ms, clock=clock, policy=POLICY)
    judge = Judge(runtime, clock, task.metrics()[:1], hz=config.hz, seed=config.seed)
    faults, judged = faults_of(task), []
    with progress("evaluate", total=len(faults)) as bar:
        for fault in faults:
            judged.append(judge.judge(fault, frames_of(samples, streams)))
            bar.advance()
    key = data_key(data.digest, config.split)
    rows = trouble_rows(faults, judged, _evaluations(samples, streams, judged, key), task.metrics()[0])
    draft.write_json("trouble.json", {"metric": task.metrics()[0].name, "tier": runtime.tier, "rows": rows,
                                      "deadline_ms": config.deadline_ms, "hz": config.hz, "data": key})
    draft.write_json("metrics.json", {row["fault"] + (f" {row['level']}" if row["level"] else ""): {
        "valid": row["valid"], "value_valid": row["value_valid"], "value_unguarded": row["value_unguarded"],
    } for row in rows})
    draft.write_tensors(f"{STATS}.safetensors", _tensors(faults, judged))


def _evaluations(samples: Samples, streams: Sequence[Stream], judged: Sequence[Judged], key: str) -> list[Evaluation]:
    """One evaluation a fault, all of the same samples."""
    rows = np.concatenate([stream.judged for stream in streams])
    ids, groups = tuple(samples.ids[int(row)] for row in rows), np.asarray(samples.groups, np.int64)[rows]
    return [Evaluation(ids, groups, {}, found.stats, key) for found in judged]


def _tensors(faults: Sequence[Fault], judged: Sequence[Judged]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for fault, each in zip(faults, judged, strict=True):
        found[f"{fault.key}.valid"] = each.valid.astype(np.uint8)
        found |= {f"{fault.key}.{name}": stats for name, stats in each.stats.items()}
    return found
