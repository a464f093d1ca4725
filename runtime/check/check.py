"""`fmdeploy check`: every budget, measured on this machine, with a result that a CI system can trust.

Accuracy budgets hold for every tier, since each may come to serve; latency and memory hold for the tier that would
serve here. INT8 must earn its place: it is preferred only where it is within its accuracy budgets *and* faster than
FP32 beyond doubt (the interval of the paired speed-up lies above one).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from fmdeploy.artifact import Artifact
from fmdeploy.budgets import Budgets, read_budgets
from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath, OutputPath, Positional, RequiredKey, RunOnly, StageConfig
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.draft import Draft, produce
from fmdeploy.environment import describe_environment, package_versions
from fmdeploy.errors import ArtifactError, ConfigError, GateError
from fmdeploy.evaluate.evaluation import Evaluation, data_key
from fmdeploy.evaluate.examples import save_examples
from fmdeploy.evaluate.gates import Row, gates_pass
from fmdeploy.jetson.telemetry import Telemetry
from fmdeploy.manifest import Kind
from fmdeploy.progress import progress
from fmdeploy.runtime.bundle import Bundle, open_bundle
from fmdeploy.runtime.check.gatefiles import text_lines, write_gate_files
from fmdeploy.runtime.check.measured import Measured
from fmdeploy.runtime.check.replace import produce_again
from fmdeploy.runtime.check.rows import Preference, accuracy_rows, prefer, resource_rows
from fmdeploy.runtime.check.seen import seen_row
from fmdeploy.runtime.check.sensors import sensor_rows
from fmdeploy.runtime.check.tier import CheckedTier, Predictor, check_tier
from fmdeploy.runtime.loading import Terms
from fmdeploy.runtime.measure.conditions import describe_machine, watched
from fmdeploy.runtime.measure.latency import golden_frames, measure_latency
from fmdeploy.runtime.measure.memory import probe_memory
from fmdeploy.runtime.run import task_name
from fmdeploy.runtime.tiers import TABLE, TIERS
from fmdeploy.runtime.trial import NO_TARGET
from fmdeploy.strictjson import finite_or_none
from fmdeploy.task import Metric, Samples, Task, load_task


class CheckConfig(StageConfig):
    """Options of `fmdeploy check`."""

    bundle: Annotated[InputPath, Positional()] = Field(description="Folder of a BUNDLE")
    data: InputPath = Field(description="Folder of a DATASET")
    out: OutputPath = Field(description="Folder of the CHECK to write")
    budgets: InputPath | None = Field(default=None, description="A budgets.toml; default: the bundle's own")
    target: str | None = Field(default=None, description="Target of the budgets; default: the only one")
    split: str = Field(default="test", description="Split to evaluate on")
    task: str = Field(default="", description="Task that reads the dataset; default: the bundle's")
    tiers: tuple[str, ...] | None = Field(
        default=None, description="Tiers to check, best first; default: those that the bundle has, and --engines"
    )
    threads: int = Field(default=1, ge=1, le=256, description="Threads inside one run")
    runs: int = Field(default=300, ge=30, description="Latency rounds in which every tier takes one frame")
    engines: InputPath | None = Field(default=None, description="Folder of ENGINEs: TensorRT tiers are checked, too")
    root: InputPath = Field(
        default=Path("/"), description="Folder below which /proc, /sys and the board's tools are read; for tests"
    )
    require_signature: RequiredKey = None
    again: Annotated[bool, RunOnly()] = Field(default=False, description="Measure anew and replace the CHECK at --out")


class CheckRequest(StageConfig):
    """What identifies a check: its options, the limits themselves, and what it was measured with."""

    task: str
    split: str
    tiers: tuple[str, ...]
    threads: int
    runs: int
    target: str
    machine: str
    processor: str
    num_cpus: int | None
    packages: dict[str, str]
    budgets: dict[str, Any]


@command(CheckConfig)
def check(config: CheckConfig) -> Outcome:
    """Measure every budget here and write a CHECK; exit 1 when one fails or was not measured.

    It always measures: what is at --out already is refused, or replaced with --again.
    """
    bundle = open_bundle(config.bundle, require_signature=config.require_signature)
    data = open_dataset(config.data)
    limits = bundle.budgets if config.budgets is None else read_budgets(config.budgets)
    target, _ = limits.for_target(config.target)
    name = task_name(bundle, config.task)
    tiers = config.tiers or default_tiers(bundle, config.engines) or TIERS
    if config.split in data.splits and not data.splits[config.split]:
        raise GateError("nothing can be measured: the split has no samples", where=data.artifact.root,
                        found=f"split {config.split!r}", fix="Split it again: data split")
    request = CheckRequest(task=name, split=config.split, tiers=tiers, threads=config.threads, runs=config.runs,
                           target=target, budgets=limits.model_dump(mode="json"), **_this_machine())
    job = CheckJob(bundle, data, limits, request, Place(config.root, config.engines))
    inputs = {"bundle": bundle.artifact, "data": data.artifact}

    def write(out: Path) -> Artifact:
        return produce(out, Kind.CHECK, stage="check", config=request, inputs=inputs, build=job.build)

    return outcome_of_check(produce_again(config.out, "check", write, again=config.again))


def _this_machine() -> dict[str, Any]:
    """What a measurement depends on besides its options."""
    found, versions = describe_environment(), package_versions()
    packages = {name: versions[name] for name in ("onnxruntime", "numpy") if name in versions}
    return {**{key: found[key] for key in ("machine", "processor", "num_cpus")}, "packages": packages}


def outcome_of_check(artifact: Artifact) -> Outcome:
    """Return what a CHECK says, with its exit code: also for one that was written before."""
    found = artifact.json("check.json")
    rows = [Row.from_json(raw) for raw in artifact.json("gates.json")]
    passed = gates_pass(rows)
    lines = [*text_lines(rows), *found["notes"], f"{'passed' if passed else 'NOT PASSED'}: {artifact.root}"]
    data = {"kind": artifact.kind.value, "path": str(artifact.root), "digest": artifact.digest, "passed": passed,
            "gates": [row.to_json() for row in rows], **found}
    return Outcome(tuple(lines), data, 0 if passed else 1)


class Place(NamedTuple):
    """Where a check looks for the machine and for engines."""

    root: Path
    engines: Path | None

    @property
    def terms(self) -> Terms:
        """Tiers are admitted whatever they cost: budgets are what the rows are for."""
        return Terms(engines=self.engines, target=NO_TARGET)


def default_tiers(bundle: Bundle, engines: Path | None) -> tuple[str, ...]:
    """Return the tiers that the bundle has a file for: those of this processor, and with engines those of TensorRT."""
    kinds = ("cpu",) if engines is None else ("cpu", "tensorrt")
    return tuple(tier.name for tier in TABLE.values() if tier.backend in kinds and tier.variant in bundle.variants)


class CheckJob:
    """One check in the making."""

    def __init__(self, bundle: Bundle, data: Dataset, limits: Budgets, request: CheckRequest, place: Place) -> None:
        self.bundle, self.data, self.limits, self.request, self.place = bundle, data, limits, request, place
        self.task: Task = load_task(request.task)
        if self.task.io.digest != bundle.io.digest:
            raise ArtifactError("has other inputs and outputs than the task", where=bundle.artifact.root,
                                expected=f"io of task {request.task}", fix="Name the right --task")
        self.metrics = self.task.metrics()
        self.metric = _primary(self.metrics, limits.accuracy.metric)
        self.key = data_key(data.digest, request.split)

    def build(self, draft: Draft) -> None:
        """Measure everything and write the CHECK, whatever the gates say."""
        samples = self.task.samples(self.data, self.request.split)
        tiers = self._tiers(samples)
        running = {tier.name: tier.runtime for tier in tiers if tier.runtime is not None}
        frames = golden_frames(self.bundle)
        with Telemetry(self.place.root) as eyes:
            times, conditions = watched(lambda: measure_latency(running, frames, self.request.runs),
                                        self.place.root, eyes)
            peaks = {name: probe_memory(self.bundle, name, threads=self.request.threads, root=self.place.root,
                                        engines=self.place.engines, telemetry=eyes) for name in running}
        teacher = self._teacher()
        rows = [seen_row(self.bundle.artifact, self.data, samples.ids),
                *accuracy_rows(tiers, teacher, self.metric, self.limits.accuracy),
                *sensor_rows(self.bundle, tiers, samples, self.metric, self.limits)]
        preference = prefer(tiers, rows, times, conditions.why_not)
        _, budget = self.limits.for_target(self.request.target)
        rows += resource_rows(self.bundle, preference.tier, times, peaks, conditions, self.limits.size_mib, budget)
        self._write(draft, tiers, samples, rows, preference, Measured(times, conditions, peaks), teacher)

    def _tiers(self, samples: Samples) -> list[CheckedTier]:
        names, threads = self.request.tiers, self.request.threads
        with progress("check", total=len(samples) * len(names)) as bar:
            return [check_tier(self.bundle, name, samples, self.metrics, threads=threads, data=self.key, bar=bar,
                               terms=self.place.terms) for name in names]

    def _teacher(self) -> Evaluation | None:
        """The teacher's evaluation from the bundle, when it is of this very data."""
        for name in ("teacher_evaluation", "teacher_validation"):
            if self.bundle.artifact.has(f"{name}.json"):
                found = Evaluation.load(self.bundle.artifact, name)
                if found.data == self.key:
                    return found
        return None

    def _write(
        self, draft: Draft, tiers: Sequence[CheckedTier], samples: Samples, rows: list[Row], preference: Preference,
        measured: Measured, teacher: Evaluation | None,
    ) -> None:
        for tier in tiers:
            if tier.evaluation is not None:
                tier.evaluation.save(draft, f"evaluation.{tier.name}")
                save_examples(draft, Predictor(tier, count=False), samples, name=f"examples.{tier.name}")
        values = {tier.name: self._values(tier.evaluation) for tier in tiers if tier.evaluation is not None}
        if teacher is not None:
            values["teacher"] = self._values(teacher)
        draft.write_json("metrics.json", {"values": values, "samples": len(samples)})
        draft.write_json("latency.json", {name: {"ms": ms, "threads": self.request.threads}
                                          for name, ms in measured.times.items()})
        notes = [preference.reason, self.bundle.signature.note(), *measured.lines(), *_alarms(tiers, len(samples)),
                 *_remarks(self.bundle, tiers)]
        draft.write_json("check.json", {
            "bundle": self.bundle.digest, "data": self.data.digest, "task": self.request.task,
            "split": self.request.split, "target": self.request.target, "machine": self.request.machine,
            "metric": self.metric.name, "preferred": preference.to_json(), "notes": notes, "values": values,
            "tiers": {tier.name: {**tier.report.to_json(), "flags": dict(tier.flags)} for tier in tiers},
            **measured.to_json(self.request.threads), "environment": describe_machine(self.place.root),
        })
        write_gate_files(draft, rows, title=f"fmdeploy check, target {self.request.target}", notes=notes)

    def _values(self, evaluation: Evaluation) -> dict[str, Any]:
        """Every metric overall, and the primary one a slice; None where undefined."""
        known = [metric for metric in self.metrics if metric.name in evaluation.stats]
        overall = {metric.name: finite_or_none(evaluation.value(metric)) for metric in known}
        slices = {name: finite_or_none(value) for name, value in evaluation.slice_values(self.metric).items()}
        return {**overall, "slices": slices}


def _primary(metrics: Sequence[Metric], name: str) -> Metric:
    for metric in metrics:
        if metric.name == name:
            return metric
    raise ConfigError("the task has no such metric", where="budgets: accuracy.metric", found=name,
                      expected=" or ".join(metric.name for metric in metrics))


def _remarks(bundle: Bundle, tiers: Sequence[CheckedTier]) -> list[str]:
    """What is odd about the files that run."""
    variants = dict.fromkeys(TABLE[tier.name].variant for tier in tiers if tier.runtime is not None)
    return [remark for variant in variants for remark in bundle.remarks(variant)]


def _alarms(tiers: Sequence[CheckedTier], frames: int) -> list[str]:
    """The guards' false-alarm rate, since the evaluation's data are clean."""
    flags = next((tier.flags for tier in tiers if tier.runtime is not None), None)
    if not flags:
        return []
    text = ", ".join(f"{code} {100 * count / frames:.1f} %" for code, count in sorted(flags.items()))
    return [f"guards on the evaluation's frames: {text}"]

