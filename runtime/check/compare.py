"""`fmdeploy compare`: is the candidate as good as what is deployed, overall and in every slice?"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.budgets import SLICES, AccuracyBudget
from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath, OutputPath, Positional, StageConfig
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ArtifactError
from fmdeploy.evaluate.bootstrap import check_paired
from fmdeploy.evaluate.evaluation import Evaluation
from fmdeploy.evaluate.gates import Row, limit_gate, not_measured, overall_gate, slice_gates
from fmdeploy.manifest import Kind
from fmdeploy.runtime.check.check import outcome_of_check
from fmdeploy.runtime.check.gatefiles import write_gate_files
from fmdeploy.strictjson import finite_or_none
from fmdeploy.task import Metric, load_task


class CompareConfig(StageConfig):
    """Options of `fmdeploy compare`."""

    candidate: Annotated[InputPath, Positional()] = Field(description="CHECK of the candidate")
    deployed: Annotated[InputPath, Positional()] = Field(description="CHECK of what is deployed, on the same data")
    out: OutputPath = Field(description="Folder of the CHECK to write")
    tier: str | None = Field(default=None, description="Tier to compare; default: the one each check prefers")
    max_drop: float = Field(default=0.01, ge=0, lt=1, description="Relative drop allowed overall")
    max_slice_drop: float = Field(default=0.05, ge=0, lt=1, description="Relative drop allowed in every slice")
    max_latency_ratio: float | None = Field(default=None, gt=0, description="Allowed p50 latency, candidate / deployed")
    min_samples: int = Field(default=200, ge=2, description="Fewer samples than this: not measured")
    min_slice_samples: int = Field(default=100, ge=2, description="The same for one slice")
    min_groups: int = Field(default=6, ge=2, description="Fewer independent groups than this cannot pass")
    required_slices: tuple[str, ...] = Field(default=(), description="Slices that must be measured, such as rare")
    slices: tuple[str, ...] = Field(default=SLICES, description="Slice axes to compare")
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="Two-sided coverage of the intervals")


@command(CompareConfig)
def compare(config: CompareConfig) -> Outcome:
    """Gate a candidate against what is deployed, paired on the same samples; exit 1 when it is not as good."""
    candidate, deployed = (open_artifact(path, Kind.CHECK) for path in (config.candidate, config.deployed))
    for artifact in (candidate, deployed):
        if artifact.manifest.stage != "check":
            raise ArtifactError("was not written by check", where=artifact.root, found=artifact.manifest.stage)

    def build(draft: Draft) -> None:
        _build(draft, config, candidate, deployed)

    inputs = {"candidate": candidate, "deployed": deployed}
    return outcome_of_check(produce(config.out, Kind.CHECK, stage="compare", config=config, inputs=inputs, build=build))


def _build(draft: Draft, config: CompareConfig, candidate: Artifact, deployed: Artifact) -> None:
    metric, other = _metric(candidate), _metric(deployed)
    (name, after), (before_name, before) = (_evaluation(config, artifact) for artifact in (candidate, deployed))
    check_paired(before, after)
    budget = AccuracyBudget(metric=metric.name, min_samples=config.min_samples, confidence=config.confidence,
                            min_slice_samples=config.min_slice_samples, slices=config.slices,
                            required_slices=config.required_slices, min_groups=config.min_groups)
    title = f"candidate {metric.name} drop vs deployed"
    if metric.name == other.name:
        rows = [overall_gate(title, before, after, metric, config.max_drop, budget),
                *slice_gates(title, before, after, metric, config.max_slice_drop, budget)]
    else:
        reason = f"the checks gate different metrics: {metric.name} and {other.name}"
        rows = [not_measured(title, reason, limit=config.max_drop, unit="1")]
    rows += _latency_rows(config, candidate, deployed, name, before_name)
    values = {"candidate": finite_or_none(after.value(metric)), "deployed": finite_or_none(before.value(other))}
    draft.write_json("metrics.json", {"values": values})
    notes = [f"candidate: {name} of {candidate.digest[:12]}, deployed: {before_name} of {deployed.digest[:12]}"]
    draft.write_json("check.json", {"notes": notes, "values": values, "metric": metric.name})
    write_gate_files(draft, rows, title="fmdeploy compare", notes=notes)


def _metric(check: Artifact) -> Metric:
    found = check.json("check.json")
    return next(m for m in load_task(found["task"]).metrics() if m.name == found["metric"])


def _evaluation(config: CompareConfig, check: Artifact) -> tuple[str, Evaluation]:
    tier = config.tier or check.json("check.json")["preferred"]["tier"]
    if tier is None or not check.has(f"evaluation.{tier}.json"):
        raise ArtifactError("has no evaluation of the tier", where=check.root, expected=tier)
    return tier, Evaluation.load(check, f"evaluation.{tier}")


def _latency_rows(
    config: CompareConfig, candidate: Artifact, deployed: Artifact, tier: str, before_tier: str
) -> list[Row]:
    if config.max_latency_ratio is None:
        return []
    name, limit = "latency p50 ratio, candidate / deployed", config.max_latency_ratio
    if _machine(candidate) != _machine(deployed):
        return [not_measured(name, "the two checks ran on different machines", limit=limit, unit="x")]
    after = candidate.json("check.json")["latency"][tier]
    before = deployed.json("check.json")["latency"][before_tier]
    if after["threads"] != before["threads"]:
        reason = f"the checks ran with {after['threads']} and {before['threads']} threads"
        return [not_measured(name, reason, limit=limit, unit="x")]
    if reason := _conditions_differ(candidate, deployed):
        return [not_measured(name, reason, limit=limit, unit="x")]
    return [limit_gate(name, after["p50_ms"] / before["p50_ms"], limit, "x")]


def _conditions_differ(candidate: Artifact, deployed: Artifact) -> str:
    """Why the times of two checks cannot be compared; empty where they can."""
    conditions = [check.json("check.json").get("conditions", {}) for check in (candidate, deployed)]
    for who, found in zip(("candidate", "deployed"), conditions, strict=True):
        if found.get("tainted") or found.get("unknown"):
            return f"the check of the {who} is no measurement: {(found['tainted'] or found['unknown'])[0]}"
    modes = [(found.get("power_mode") or {}).get("name") for found in conditions]
    return "" if modes[0] == modes[1] else f"the checks ran in power modes {modes[0]} and {modes[1]}"


def _machine(check: Artifact) -> tuple[Any, ...]:
    environment = check.manifest.environment
    return tuple(environment.get(key) for key in ("processor", "num_cpus", "machine"))
