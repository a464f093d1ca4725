"""Tables: where everything came from, how big it is, and what it was made with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fmdeploy.artifact import Artifact
from fmdeploy.evaluate.report.roles import ancestors
from fmdeploy.evaluate.report.sources import Sources
from fmdeploy.evaluate.report.words import count, mebibytes
from fmdeploy.manifest import Kind, Parent

PLAIN_KEYS = ("fmdeploy", "python", "system", "machine", "processor", "num_cpus")
ORDER = (Kind.DATASET, Kind.TEACHER, Kind.ADAPTER, Kind.FEATURES, Kind.STUDENT, Kind.QUANTIZED, Kind.BUNDLE,
         Kind.ENGINE, Kind.CHECK, Kind.EVALUATION, Kind.PROBE)


@dataclass(frozen=True)
class LineageRow:
    """One artifact: what, by which stage, its digest, its parents, how long it took and whether the bundle needs it."""

    kind: str
    name: str
    stage: str
    digest: str
    inputs: tuple[str, ...]
    seconds: str
    part: str


def lineage_rows(sources: Sources) -> list[LineageRow]:
    """The given artifacts in pipeline order, then what they were made from and was not given."""
    ordered = sorted(sources.artifacts, key=lambda a: ORDER.index(a.kind))
    given = {artifact.digest for artifact in ordered}
    others = {digest: parent for artifact in ordered for digest, parent in ancestors(artifact).items()
              if digest not in given}
    known = ancestors(sources.bundle) if sources.bundle is not None else {}
    return [*(_lineage_row(artifact, sources.bundle) for artifact in ordered),
            *(_absent_row(parent, "ancestor of the bundle" if parent.digest in known else "–")
              for parent in sorted(others.values(), key=lambda p: ORDER.index(p.kind)))]


def _absent_row(parent: Parent, part: str) -> LineageRow:
    return LineageRow(parent.kind.value, "not given", parent.stage, parent.digest, _inputs(parent.inputs), "–", part)


def _inputs(parents: Mapping[str, Parent]) -> tuple[str, ...]:
    return tuple(f"{role}: {parent.digest[:12]}" for role, parent in sorted(parents.items()))


def _lineage_row(artifact: Artifact, bundle: Artifact | None) -> LineageRow:
    seconds = artifact.manifest.environment.get("seconds")
    return LineageRow(artifact.kind.value, artifact.root.resolve().name, artifact.manifest.stage, artifact.digest,
                      _inputs(artifact.inputs), f"{seconds:.1f}" if isinstance(seconds, float) else "–",
                      _part(artifact, bundle))


def _part(artifact: Artifact, bundle: Artifact | None) -> str:
    """How an artifact hangs together with the bundle."""
    if bundle is None:
        return "–"
    if artifact.digest == bundle.digest:
        return "is the bundle"
    if artifact.digest in ancestors(bundle):
        return "ancestor of the bundle"
    return "judges the bundle" if bundle.digest in ancestors(artifact) else "for comparison only"


@dataclass(frozen=True)
class SizeRow:
    """One model: parameters, file and file size."""

    name: str
    parameters: str
    share: str
    file: str
    size: str


def size_rows(sources: Sources) -> list[SizeRow]:
    """Networks with their parameters, then the model files of the bundle."""
    teacher = sources.model("teacher")
    whole = parameters_of(teacher.artifact) if teacher is not None and teacher.artifact is not None else None
    rows = [_network_row(m.name, m.artifact, whole) for m in sources.models if m.artifact is not None
            and m.artifact.kind in (Kind.TEACHER, Kind.STUDENT)]
    if sources.bundle is not None:
        for name, entry in sorted(sources.bundle.manifest.files.items()):
            if name.endswith(".onnx"):
                rows.append(SizeRow(f"bundle {name.removeprefix('model.').removesuffix('.onnx')}", "–", "–", name,
                                    mebibytes(entry.size)))
    return rows


def _network_row(name: str, artifact: Artifact, whole: int | None) -> SizeRow:
    found = parameters_of(artifact)
    share = "–" if not found or not whole else "all" if found == whole else f"1/{whole / found:.1f}"
    weights = next((n for n in sorted(artifact.manifest.files) if n.startswith("model.safetensors")), "")
    size = mebibytes(artifact.manifest.files[weights].size) if weights else "–"
    return SizeRow(name, count(found) if found else "–", share, weights or "–", size)


def parameters_of(artifact: Artifact) -> int | None:
    """Number of parameters that a TEACHER or STUDENT states."""
    for name in ("model.json", "metrics.json"):
        if artifact.has(name):
            found = artifact.json(name)
            for key in ("parameters", "params"):
                if isinstance(found.get(key), int):
                    return int(found[key])
    return None


def environment_rows(sources: Sources) -> list[tuple[str, str]]:
    """Name → version or description; where artifacts differ, each value with the kinds that have it."""
    facts: dict[str, dict[str, list[str]]] = {}
    for artifact in sources.artifacts:
        for key, value in _facts(artifact.manifest.environment):
            facts.setdefault(key, {}).setdefault(value, []).append(artifact.kind.value)
    return [(key, _joined(values)) for key, values in facts.items()]


def _facts(environment: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key in PLAIN_KEYS:
        if key in environment:
            yield key.replace("num_cpus", "CPUs"), str(environment[key])
    packages = environment.get("packages", {})
    if isinstance(packages, dict):
        yield from ((str(name), str(version)) for name, version in sorted(packages.items()))


def _joined(values: dict[str, list[str]]) -> str:
    if len(values) == 1:
        return next(iter(values))
    return " · ".join(f"{value} ({', '.join(dict.fromkeys(kinds))})" for value, kinds in values.items())


@dataclass(frozen=True)
class SplitRow:
    """One split of a dataset."""

    name: str
    sequences: str
    frames: str


def split_rows(sources: Sources) -> list[SplitRow]:
    """Sequences and frames of each split of each dataset."""
    rows = []
    for data in sources.datasets:
        frames = {s.id: s.frames for s in data.sequences}
        rows += [SplitRow(sources.name_of(data) + name, count(len(ids)), count(sum(frames[i] for i in ids)))
                 for name, ids in data.splits.items()]
    return rows
