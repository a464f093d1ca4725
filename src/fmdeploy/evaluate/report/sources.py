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
from fmdeploy.evaluate.report.roles import is_distilled, of_kind, students_in_order, teachers_in_order
from fmdeploy.manifest import Kind
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
    datasets: tuple[Dataset, ...] = ()
    """All that were given; `data` is the first, the one that the models were judged on."""

    def name_of(self, data: Dataset) -> str:
        """What stands in front of a row about one of several datasets; nothing where there is one."""
        return f"{data.artifact.root.resolve().name}: " if len(self.datasets) > 1 else ""

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
        ArtifactError: two BUNDLEs were given.
        ConfigError: the task they name cannot be loaded.
    """
    checks = tuple(a for a in artifacts if a.kind is Kind.CHECK)
    task, bundle = _task(artifacts), _only(artifacts, Kind.BUNDLE)
    models = list(_models(artifacts, checks))
    datasets = _datasets(artifacts, models)
    data = datasets[0] if datasets else None
    if task is not None and data is not None:
        models += list(_baselines(task, data, models))
    models, left_out = _comparable(models)
    return Sources(tuple(artifacts), task, data, tuple(models), bundle, checks, left_out, datasets)


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


def _datasets(artifacts: Sequence[Artifact], models: Sequence[Model]) -> tuple[Dataset, ...]:
    """The given datasets, the one that the models were judged on first."""
    judged = next((m.evaluation.data.rpartition(":")[0] for m in models if m.evaluation is not None), None)
    found = sorted(of_kind(artifacts, Kind.DATASET), key=lambda a: a.digest != judged)
    return tuple(open_dataset(artifact.root) for artifact in found)


def _models(artifacts: Sequence[Artifact], checks: Sequence[Artifact]) -> Iterator[Model]:
    students = students_in_order(artifacts)
    student = _model("student", "student", students[0]) if students else _carried("student", artifacts)
    teachers = teachers_in_order(artifacts, students[0] if students else None)
    teacher = _leading(teachers, artifacts, student)
    yield from (found for found in (teacher, student) if found is not None)
    yield from _int8(artifacts, checks)
    shown = teacher.artifact if teacher is not None else None
    yield from (_model(f"teacher {other.root.resolve().name}", "other", other) for other in teachers
                if shown is None or other.digest != shown.digest)
    yield from map(_other_student, students[1:])


def _leading(teachers: Sequence[Artifact], artifacts: Sequence[Artifact], student: Model | None) -> Model | None:
    """The teacher that the student is held against, judged on the student's samples where later artifacts know that."""
    carried = _carried("teacher", artifacts)
    if not teachers:
        return carried
    name = "teacher" if len(teachers) == 1 else f"teacher {teachers[0].root.resolve().name}"
    found = _model(name, "teacher", teachers[0])
    is_apart = found.evaluation is None or (
        student is not None and student.evaluation is not None and found.evaluation.data != student.evaluation.data)
    if carried is None or not is_apart:
        return found
    # Of several, and of one that was never judged, nobody knows whether the carried evaluation is its own.
    is_known = len(teachers) == 1 and found.evaluation is not None
    return Model(name if is_known else "best teacher", "teacher", teachers[0] if is_known else None, carried.evaluation)


def _carried(role: str, artifacts: Sequence[Artifact]) -> Model | None:
    """A model that was not given itself: later artifacts carry the evaluations of the ones they came from."""
    for artifact in reversed(artifacts):
        evaluation = _evaluation(artifact, f"{role}_evaluation")
        if evaluation is not None:
            return Model(role, role, None, evaluation)
    return None


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
            kept.append(Model(model.name, model.look, model.artifact))
    return kept, tuple(left_out)


def require_evaluation(model: Model) -> Evaluation:
    """The evaluation of a model that is known to have one."""
    if model.evaluation is None:
        raise DataError("has no evaluation", where=model.name)
    return model.evaluation
