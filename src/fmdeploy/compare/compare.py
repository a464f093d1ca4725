"""`fmdeploy compare`: is the candidate as good as what is deployed, in every domain, slice and canary?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.budgets import SLICES, AccuracyBudget
from fmdeploy.command import Outcome, command
from fmdeploy.compare.canary import NAME as CANARIES
from fmdeploy.compare.canary import canary_row, judge_cases, read_canaries
from fmdeploy.compare.domains import Json, continual, domain_rows, table_lines
from fmdeploy.compare.judged import ALL, MODELS, Judged, judged_check, judged_model
from fmdeploy.compare.latency import NAME as LATENCY
from fmdeploy.compare.latency import latency_row
from fmdeploy.config import InputPath, OutputPath, Positional, StageConfig
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ConfigError
from fmdeploy.evaluate.baselines import evaluate_baselines
from fmdeploy.evaluate.evaluation import Evaluation, data_key
from fmdeploy.evaluate.gates import Row, not_measured
from fmdeploy.manifest import Kind
from fmdeploy.runtime.check.check import outcome_of_check
from fmdeploy.runtime.check.gatefiles import write_gate_files
from fmdeploy.runtime.check.seen import seen_row
from fmdeploy.strictjson import finite_or_none

LEAST_REASON = 8  # characters: shorter than "ticket 7" says nothing


class CompareConfig(StageConfig):
    """Options of `fmdeploy compare`."""

    candidate: Annotated[InputPath, Positional()] = Field(description="CHECK of the candidate, or the model itself")
    deployed: Annotated[InputPath, Positional()] = Field(description="The same of what is deployed")
    out: OutputPath | None = Field(default=None, description="Folder of the CHECK to write; none: it is only printed")
    data: tuple[InputPath, ...] = Field(default=(), description="DATASET of one domain, for models; repeat it")
    split: str = Field(default="test", description="held-out split of each domain")
    tier: str | None = Field(default=None, description="Tier to compare; default: the one each check prefers")
    metric: str | None = Field(default=None, description="Metric, for models; default: the task's primary one")
    max_drop: float = Field(default=0.01, ge=0, lt=1, description="Relative drop allowed overall")
    domain_drop: tuple[str, ...] = Field(default=(), description="DOMAIN=DROP: a limit of its own; repeatable")
    new: tuple[str, ...] = Field(default=(), description="Domain that the candidate was to learn; repeatable")
    max_slice_drop: float = Field(default=0.05, ge=0, lt=1, description="Relative drop allowed in every slice")
    canary: InputPath | None = Field(default=None, description="JSON of cases of which none may be lost (data canary)")
    accept: tuple[str, ...] = Field(default=(), description="Canary case that may be lost all the same; repeatable")
    because: str | None = Field(default=None, description="Why, for the lineage; needed by --accept")
    max_latency_ratio: float | None = Field(default=None, gt=0, description="Allowed p50 latency, candidate / deployed")
    min_samples: int = Field(default=200, ge=2, description="Fewer samples than this: not measured")
    min_slice_samples: int = Field(default=100, ge=2, description="The same for one slice")
    min_groups: int = Field(default=6, ge=2, description="Fewer independent groups than this cannot pass")
    required_slices: tuple[str, ...] = Field(default=(), description="Slices that must be measured, such as rare")
    slices: tuple[str, ...] = Field(default=SLICES, description="Slice axes to compare")
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="Two-sided coverage of the intervals")

    @model_validator(mode="after")
    def _agree(self) -> CompareConfig:
        if bool(self.accept) != (self.because is not None):
            raise ValueError("a lost canary is accepted by name and with a reason: give both --accept and --because")
        if self.accept and self.canary is None:
            raise ValueError("--accept needs --canary")
        if self.because is not None and len(self.because.strip()) < LEAST_REASON:
            raise ValueError(f"--because says why, in at least {LEAST_REASON} characters")
        if self.accept and self.out is None:
            raise ValueError("an accepted loss is written into the lineage: --accept needs --out")
        return self

    def resolved(self) -> dict[str, Any]:
        """With the canaries themselves in place of their path."""
        found = super().resolved()
        canaries = read_canaries(self.canary).model_dump(mode="json") if self.canary else None
        return {**found, **({"canaries": canaries} if canaries else {})}


@command(CompareConfig)
def compare(config: CompareConfig) -> Outcome:
    """Gate a candidate against what is deployed, paired on the same samples; exit 1 when it is not as good.

    Two CHECKs are compared as they were measured. Two models (TEACHER, STUDENT, QUANTIZED, BUNDLE) are evaluated here
    on the held-out split of every --data; each is a domain, called by its folder. Old and new are printed per domain
    and slice, with what was forgotten and, for domains named by --new, gained and known beforehand.
    """
    if config.out is not None:
        return _compare(config, config.out)
    with tempfile.TemporaryDirectory() as folder:
        return _unwritten(_compare(config, Path(folder) / "check"))


def _unwritten(found: Outcome) -> Outcome:
    """Without the path of a CHECK that is gone by now."""
    verdict = "passed" if found.exit_code == 0 else "NOT PASSED"
    return Outcome((*found.lines[:-1], verdict), {**found.data, "path": None}, found.exit_code)


def _compare(config: CompareConfig, out: Path) -> Outcome:
    artifacts = [open_artifact(path, Kind.CHECK, *MODELS) for path in (config.candidate, config.deployed)]
    domains = _open_domains(config, artifacts)
    roles = dict(zip(("candidate", "deployed"), artifacts, strict=True))
    inputs = {**roles, **{f"data{number}": data.artifact for number, data in enumerate(domains.values())}}
    made = produce(out, Kind.CHECK, stage="compare", config=config, inputs=inputs,
                   build=lambda draft: _build(draft, config, artifacts, domains))
    outcome = outcome_of_check(made)
    return Outcome((*table_lines(outcome.data["comparison"]), "", *outcome.lines), outcome.data, outcome.exit_code)


def _open_domains(config: CompareConfig, artifacts: list[Artifact]) -> dict[str, Dataset]:
    checks = [artifact.kind is Kind.CHECK for artifact in artifacts]
    if any(checks) and (config.data or not all(checks)):
        raise ConfigError("compares two CHECKs without --data, or two models with it", where="compare",
                          found=" and ".join(artifact.kind.value for artifact in artifacts))
    if not any(checks) and not config.data:
        raise ConfigError("models are evaluated here: name the data", where="compare", fix="Add --data DATASET")
    if any(checks) and config.metric is not None:
        raise ConfigError("CHECKs are compared by the metric of their budgets", where="metric", found=config.metric,
                          fix="Leave it out, or compare the models")
    if config.tier is not None and not any(a.kind in (Kind.CHECK, Kind.BUNDLE) for a in artifacts):
        raise ConfigError("a tier is part of a BUNDLE or a CHECK", where="tier", found=config.tier, fix="Leave it out")
    names = [Path(path).resolve().name for path in config.data]
    if len(set(names)) != len(names):
        raise ConfigError("two domains have one name: they are called by their folders", where="data",
                          found=", ".join(names), fix="Rename a folder")
    known = names or [ALL]
    for name in (*config.new, *_limits_given(config)):
        if name not in known:
            raise ConfigError("no such domain", where=repr(name), expected=", ".join(known))
    domains = {name: open_dataset(path) for name, path in zip(names, config.data, strict=True)}
    if len({data.digest for data in domains.values()}) != len(domains):
        raise ConfigError("two domains are the same DATASET", where="data", found=", ".join(names))
    return domains


def _limits_given(config: CompareConfig) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in config.domain_drop:
        name, _, number = text.rpartition("=")
        if name in found:
            raise ConfigError("has two limits", where=f"domain_drop {text!r}", fix="Give one for each domain")
        try:
            found[name] = float(number)
        except ValueError:
            found[name] = -1.0
        if not name or not 0 <= found[name] < 1:
            raise ConfigError("is no limit of a domain", where=f"domain_drop {text!r}", expected="DOMAIN=DROP, 0 .. 1")
    return found


def _build(draft: Draft, config: CompareConfig, artifacts: list[Artifact], domains: Mapping[str, Dataset]) -> None:
    candidate, deployed = (_judge(config, artifact, domains) for artifact in artifacts)
    rows, table = _accuracy(config, candidate, deployed)
    found: Json = {"continual": _continual(config, candidate, deployed, domains)}
    if config.canary is not None:
        row, found["canaries"] = _canaries(config, config.canary, candidate, deployed)
        rows.append(row)
    rows += list(_seen_rows(candidate, domains))
    if config.max_latency_ratio is not None:
        rows.append(_latency(config, candidate, deployed))
    values = {"candidate": _values(candidate), "deployed": _values(deployed)}
    notes = [f"candidate: {candidate.label}, deployed: {deployed.label}", *_override_notes(config)]
    draft.write_json("metrics.json", {"values": values})
    draft.write_json("check.json", {"notes": notes, "values": values, "metric": candidate.metric.name,
                                    "comparison": table, **found})
    write_gate_files(draft, rows, title="fmdeploy compare", notes=notes)


def _canaries(config: CompareConfig, path: Path, candidate: Judged, deployed: Judged) -> tuple[Row, list[Json]]:
    if why := _differ(candidate, deployed):
        return not_measured(CANARIES, why, limit=0.0, unit="cases"), []
    cases = judge_cases(read_canaries(path), candidate, deployed)
    return canary_row(cases, dict.fromkeys(config.accept, config.because or "")), [case.to_json() for case in cases]


def _seen_rows(candidate: Judged, domains: Mapping[str, Dataset]) -> Iterator[Row]:
    for name, data in domains.items():
        row = seen_row(candidate.artifact, data, candidate.evaluations[name].ids)
        yield replace(row, name=f"{row.name} in {name}") if len(domains) > 1 else row


def _judge(config: CompareConfig, artifact: Artifact, domains: Mapping[str, Dataset]) -> Judged:
    if artifact.kind is Kind.CHECK:
        return judged_check(artifact, config.tier)
    tier = config.tier if artifact.kind is Kind.BUNDLE else None
    return judged_model(artifact, domains, split=config.split, tier=tier, metric=config.metric)


def _accuracy(config: CompareConfig, candidate: Judged, deployed: Judged) -> tuple[list[Row], list[Json]]:
    budget = AccuracyBudget(metric=candidate.metric.name, min_samples=config.min_samples,
                            confidence=config.confidence, min_slice_samples=config.min_slice_samples,
                            slices=config.slices, required_slices=config.required_slices, min_groups=config.min_groups)
    if why := _differ(candidate, deployed):
        title = f"candidate {candidate.metric.name} drop vs deployed"
        return [not_measured(title, why, limit=config.max_drop, unit="1")], []
    _require_axes(config.slices, candidate)
    limits = {**dict.fromkeys(candidate.evaluations, config.max_drop), **_limits_given(config)}
    return domain_rows(candidate, deployed, limits, config.max_slice_drop, budget)


def _require_axes(wanted: tuple[str, ...], side: Judged) -> None:
    """Check the axes that were asked for; those of the default are judged where they are."""
    known = {axis for evaluation in side.evaluations.values() for axis in evaluation.slices}
    if wanted != SLICES and (unknown := [axis for axis in wanted if axis not in known]):
        raise ConfigError("the samples have no such slice axis", where=f"slices {unknown[0]!r}",
                          expected=", ".join(sorted(known)) or "none")


def _differ(candidate: Judged, deployed: Judged) -> str:
    """Why the numbers of the two sides are not of one kind; empty where they are."""
    if candidate.task.name != deployed.task.name:
        return f"they are of two tasks: {candidate.task.name} and {deployed.task.name}"
    if candidate.metric.name != deployed.metric.name:
        return f"the checks gate different metrics: {candidate.metric.name} and {deployed.metric.name}"
    return ""


def _continual(config: CompareConfig, candidate: Judged, deployed: Judged, domains: Mapping[str, Dataset]) -> Json:
    if _differ(candidate, deployed):
        return {}
    trivial = {}
    for name in config.new:
        samples = candidate.task.samples(domains[name], config.split) if name in domains else None
        if samples is not None and candidate.task.baselines():
            key = data_key(domains[name].digest, config.split)
            trivial[name] = _best(candidate, evaluate_baselines(candidate.task, samples, data=key))
    return continual(candidate, deployed, config.new, trivial)


def _best(side: Judged, found: Mapping[str, Evaluation]) -> Evaluation:
    sign = 1 if side.metric.higher_is_better else -1
    return max(found.values(), key=lambda evaluation: sign * evaluation.value(side.metric))


def _latency(config: CompareConfig, candidate: Judged, deployed: Judged) -> Row:
    assert config.max_latency_ratio is not None
    if candidate.artifact.kind is not Kind.CHECK:
        return not_measured(LATENCY, "only CHECKs have times", limit=config.max_latency_ratio, unit="x")
    tiers = (candidate.tier, deployed.tier)
    return latency_row(candidate.artifact, deployed.artifact, tiers, config.max_latency_ratio)


def _values(side: Judged) -> Json:
    return {name: finite_or_none(evaluation.value(side.metric)) for name, evaluation in side.evaluations.items()}


def _override_notes(config: CompareConfig) -> list[str]:
    return [f"lost canary accepted: {name}, because {config.because}" for name in config.accept]
