"""One side of a comparison: an artifact and its evaluations, one a domain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fmdeploy.artifact import Artifact
from fmdeploy.data.format import Dataset
from fmdeploy.errors import ArtifactError, ConfigError
from fmdeploy.evaluate.evaluation import Evaluation, data_key, evaluate
from fmdeploy.manifest import Kind
from fmdeploy.task import Metric, Task, load_task

MODELS = (Kind.TEACHER, Kind.STUDENT, Kind.QUANTIZED, Kind.BUNDLE)
ALL = "all"
"""Name of the one domain of a CHECK."""


@dataclass(frozen=True)
class Judged:
    """What one side scored.

    Attributes:
        artifact: A CHECK or a model.
        tier: Which tier, of a CHECK or a BUNDLE; empty otherwise.
        task: Its task.
        metric: The one that is compared.
        evaluations: Domain → evaluation on its held-out samples.
    """

    artifact: Artifact
    tier: str
    task: Task
    metric: Metric
    evaluations: Mapping[str, Evaluation]

    @property
    def label(self) -> str:
        """For people: tier or kind, and the beginning of the digest."""
        return f"{self.tier or self.artifact.kind.value} of {self.artifact.digest[:12]}"


def judged_check(check: Artifact, tier: str | None) -> Judged:
    """What a CHECK measured of a tier; default: the one it prefers.

    Raises:
        ArtifactError: it was not written by `check`, or has no such tier.
    """
    if check.manifest.stage != "check":
        raise ArtifactError("was not written by check", where=check.root, found=check.manifest.stage)
    found = check.json("check.json")
    chosen = tier or found["preferred"]["tier"]
    if chosen is None:
        raise ArtifactError("no tier served there, so none is preferred", where=check.root, fix="Name one with --tier")
    if not check.has(f"evaluation.{chosen}.json"):
        raise ArtifactError("has no evaluation of the tier", where=check.root, expected=chosen)
    task = load_task(found["task"])
    return Judged(check, chosen, task, _metric(task.metrics(), found["metric"]),
                  {ALL: Evaluation.load(check, f"evaluation.{chosen}")})


def judged_model(
    model: Artifact, domains: Mapping[str, Dataset], *, split: str, tier: str | None, metric: str | None
) -> Judged:
    """Evaluate a model here, on the held-out samples of every domain.

    Raises:
        ConfigError: its outputs were never trained, or the task has no such metric.
        DataError: a domain has no such split.
    """
    from fmdeploy.teacher.probe.loading import open_subject  # torch: not on a device, where CHECKs are compared

    subject = open_subject(model, tier=tier)
    if subject.predict is None:
        raise ConfigError("its outputs were never trained: there is nothing to compare", where=model.root,
                          fix="Fine-tune it first: fmdeploy teacher train --init")
    metrics = subject.task.metrics()
    chosen = _metric(metrics, metric)
    evaluations = {
        name: evaluate(subject.predict, subject.task.samples(data, split), metrics, data=data_key(data.digest, split))
        for name, data in domains.items()
    }
    label = subject.name if model.kind is Kind.BUNDLE else ""
    return Judged(model, label, subject.task, chosen, evaluations)


def _metric(metrics: tuple[Metric, ...], name: str | None) -> Metric:
    found = [metric for metric in metrics if name in (None, metric.name)]
    if not found:
        raise ConfigError("the task has no such metric", where=f"metric {name!r}",
                          expected=", ".join(metric.name for metric in metrics))
    return found[0]
