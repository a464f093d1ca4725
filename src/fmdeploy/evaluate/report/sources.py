"""What was given to the report, sorted into the roles that its sections speak of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fmdeploy.artifact import Artifact
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.errors import ArtifactError, DataError
from fmdeploy.evaluate.baselines import evaluate_baselines
from fmdeploy.evaluate.evaluation import Evaluation, data_key
from fmdeploy.evaluate.examples import load_examples
from fmdeploy.evaluate.gates import Row
from fmdeploy.manifest import Kind, Parent
from fmdeploy.task import Arrays, Samples, Task, load_task

CURVE = "curve.json"
BASELINE = "baseline"


@dataclass(frozen=True)
class Model:
    """One model (or trivial prediction) that the page compares."""

    name: str
    look: str
    artifact: Artifact | None = None
    evaluation: Evaluation | None = None
    examples: dict[str, Arrays] = field(default_factory=dict)


@dataclass(frozen=True)
class Sources:
    """Everything the page is made of; roles that were not given are None or empty."""

    artifacts: tuple[Artifact, ...]
    task: Task | None
    data: Dataset | None
    models: tuple[Model, ...]
    bundle: Artifact | None
    checks: tuple[Artifact, ...]
    left_out: tuple[str, ...] = ()

    def model(self, look: str) -> Model | None:
        """The first model of a role: teacher, student, int8 or scratch."""
        return next((m for m in self.models if m.look == look), None)

    def rows(self) -> tuple[Row, ...]:
        """The gates of all CHECK artifacts."""
        return tuple(Row.from_json(raw) for check in self.checks for raw in _listed(check.json("gates.json")))

    def samples(self) -> Samples | None:
        """The test samples, where the dataset and the task were given."""
        if self.task is None or self.data is None:
            return None
        return self.task.samples(self.data, "test")


def gather(artifacts: Sequence[Artifact]) -> Sources:
    """Sort artifacts into roles, load their evaluations and judge the task's trivial baselines.

    Raises:
        ArtifactError: two TEACHERs, DATASETs or BUNDLEs were given.
        ConfigError: the task they name cannot be loaded.
    """
    checks = tuple(a for a in artifacts if a.kind is Kind.CHECK)
    dataset, bundle = _only(artifacts, Kind.DATASET), _only(artifacts, Kind.BUNDLE)
    data = open_dataset(dataset.root) if dataset is not None else None
    task = _task(artifacts)
    models = list(_models(artifacts, checks))
    if task is not None and data is not None:
        models += list(_baselines(task, data, models))
    models, left_out = _comparable(models)
    return Sources(tuple(artifacts), task, data, tuple(models), bundle, checks, left_out)


def read_history(artifact: Artifact) -> dict[str, list[tuple[float, float]]]:
    """Loss and its parts over the steps of a training artifact, the sum first; empty where it has no curve."""
    found: dict[str, list[Any]] = artifact.json(CURVE) if artifact.has(CURVE) else {}
    names = sorted((n for n in found if n.partition(".")[0] == "loss"), key=lambda n: (n != "loss", n))
    return {n.removeprefix("loss."): [(s, v) for s, v in found[n] if v is not None] for n in names if found[n]}


def _listed(raw: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = raw["gates"] if isinstance(raw, dict) else raw
    return rows


def _only(artifacts: Sequence[Artifact], kind: Kind) -> Artifact | None:
    found = [a for a in artifacts if a.kind is kind]
    if len({a.digest for a in found}) > 1:
        raise ArtifactError(f"a report speaks of one {kind.value}", where=found[1].root, found=f"also {found[0].root}",
                            fix="Write one report for each")
    return found[0] if found else None


def _task(artifacts: Sequence[Artifact]) -> Task | None:
    """The task that the artifacts name, searched from the end of the pipeline."""
    names = [_task_name(a) for a in reversed(artifacts)]
    name = next((n for n in names if isinstance(n, str)), None)
    return load_task(name) if name is not None else None


def _task_name(artifact: Artifact) -> object:
    recipe = artifact.json("model.json") if artifact.has("model.json") else {}
    return artifact.manifest.config.get("task") or recipe.get("task")


def _models(artifacts: Sequence[Artifact], checks: Sequence[Artifact]) -> Iterator[Model]:
    teacher = _only(artifacts, Kind.TEACHER)
    students = [a for a in artifacts if a.kind is Kind.STUDENT]
    shipped = _shipped(students, artifacts)
    for role, artifact in (("teacher", teacher), ("student", shipped)):
        found = _model(role, role, artifact) if artifact is not None else _carried(role, artifacts)
        if found is not None:
            yield found
    yield from _int8(artifacts, checks)
    for other in students:
        if other is not shipped:
            yield _other_student(other)


def _carried(role: str, artifacts: Sequence[Artifact]) -> Model | None:
    """A model that was not given itself: later artifacts carry the evaluations of the ones they came from."""
    for artifact in reversed(artifacts):
        evaluation = _evaluation(artifact, f"{role}_evaluation")
        if evaluation is not None:
            return Model(role, role, None, evaluation)
    return None


def _shipped(students: Sequence[Artifact], artifacts: Sequence[Artifact]) -> Artifact | None:
    """The student that the bundle was made from; else the first distilled one; else the first."""
    ancestors = {digest for a in artifacts if a.kind in (Kind.BUNDLE, Kind.QUANTIZED) for digest in lineage(a)}
    ranked = sorted(students, key=lambda s: (s.digest not in ancestors, not is_distilled(s)))
    return ranked[0] if ranked else None


def is_distilled(student: Artifact) -> bool:
    """Whether a teacher (or its cache) is among the direct inputs of a STUDENT."""
    return any(parent.kind in (Kind.TEACHER, Kind.FEATURES) for parent in student.inputs.values())


def lineage(artifact: Artifact) -> set[str]:
    """Digests of everything an artifact was made from, directly or not."""

    def walk(parents: Sequence[Parent]) -> Iterator[str]:
        for parent in parents:
            yield parent.digest
            yield from walk(list(parent.inputs.values()))

    return set(walk(list(artifact.inputs.values())))


def _other_student(student: Artifact) -> Model:
    if is_distilled(student):
        return _model(student.root.name, "other", student)
    fraction = labels_of(student).get("fraction")
    if fraction is not None and fraction >= 1:
        return _model("student, all labels", "other", student)
    return _model("scratch (labels only)", "scratch", student)


def labels_of(artifact: Artifact) -> dict[str, Any]:
    """What a training stage says about the labels it used; empty where it says nothing."""
    metrics = artifact.json("metrics.json") if artifact.has("metrics.json") else {}
    found = metrics.get("labels")
    return dict(found) if isinstance(found, dict) else {}


def _model(name: str, look: str, artifact: Artifact) -> Model:
    return Model(name, look, artifact, _evaluation(artifact, "evaluation"), _examples(artifact, "examples"))


def _int8(artifacts: Sequence[Artifact], checks: Sequence[Artifact]) -> Iterator[Model]:
    """The INT8 model as the runtime ran it; where there is no check, as the fake-quantised network."""
    for check in checks:
        for variant in ("int8-cpu", "int8"):
            found = _evaluation(check, f"evaluation.{variant}")
            if found is not None:
                yield Model(f"INT8 ({variant})", "int8", check, found, _examples(check, f"examples.{variant}"))
                return
    for quantized in artifacts:
        if quantized.kind is Kind.QUANTIZED:
            yield _model("INT8 (fake-quant)", "int8", quantized)
            return


def _evaluation(artifact: Artifact, name: str) -> Evaluation | None:
    return Evaluation.load(artifact, name) if artifact.has(f"{name}.safetensors") else None


def _examples(artifact: Artifact, name: str) -> dict[str, Arrays]:
    return load_examples(artifact, name) if artifact.has(f"{name}.safetensors") else {}


def _baselines(task: Task, data: Dataset, models: Sequence[Model]) -> Iterator[Model]:
    """Trivial predictions, judged on the very samples the models were judged on."""
    identity = next((m.evaluation.data for m in models if m.evaluation is not None), data_key(data.digest, "test"))
    digest, _, split = identity.rpartition(":")
    if digest != data.digest:
        return
    found = evaluate_baselines(task, task.samples(data, split), data=identity)
    for number, (name, evaluation) in enumerate(found.items()):
        yield Model(name, BASELINE if number % 2 == 0 else f"{BASELINE}-2", None, evaluation)


def _comparable(models: Sequence[Model]) -> tuple[list[Model], tuple[str, ...]]:
    """Keep evaluations of the same samples only: anything else beside each other would mislead."""
    reference = next((m.evaluation for m in models if m.evaluation is not None), None)
    kept, left_out = [], []
    for model in models:
        own = model.evaluation
        if own is None or reference is None or (own.data == reference.data and own.ids == reference.ids):
            kept.append(model)
        else:
            left_out.append(f"{model.name}: judged on other samples than {kept[0].name if kept else 'the rest'}")
            kept.append(Model(model.name, model.look, model.artifact, None, model.examples))
    return kept, tuple(left_out)


def require_evaluation(model: Model) -> Evaluation:
    """The evaluation of a model that is known to have one."""
    if model.evaluation is None:
        raise DataError("has no evaluation", where=model.name)
    return model.evaluation
