"""Which of several artifacts of one kind a page leads with: a student may have had several teachers."""

from __future__ import annotations

from collections.abc import Sequence

from fmdeploy.artifact import Artifact
from fmdeploy.manifest import Kind, Parent

JUDGED = "evaluation.safetensors"


def ancestors(artifact: Artifact) -> dict[str, Parent]:
    """Everything an artifact was made from, directly or not, by digest; the nearest first."""
    found: dict[str, Parent] = {}
    level = [artifact.inputs]
    while level:
        parents = [parent for inputs in level for _, parent in sorted(inputs.items())]
        new = {parent.digest: parent for parent in parents if parent.digest not in found}
        found |= new
        level = [parent.inputs for parent in new.values()]
    return found


def is_distilled(student: Artifact) -> bool:
    """Whether a teacher (or its cache) is among the direct inputs of a STUDENT."""
    return any(parent.kind in (Kind.TEACHER, Kind.FEATURES) for parent in student.inputs.values())


def of_kind(artifacts: Sequence[Artifact], kind: Kind) -> list[Artifact]:
    """The artifacts of one kind, each digest once, in the order in which they were given."""
    return list({a.digest: a for a in reversed(artifacts) if a.kind is kind}.values())[::-1]


def students_in_order(artifacts: Sequence[Artifact]) -> list[Artifact]:
    """The student that the bundle was made from; else the first distilled one; else the first. Then the others."""
    made = {digest for a in artifacts if a.kind in (Kind.BUNDLE, Kind.QUANTIZED) for digest in ancestors(a)}
    return sorted(of_kind(artifacts, Kind.STUDENT), key=lambda s: (s.digest not in made, not is_distilled(s)))


def teachers_in_order(artifacts: Sequence[Artifact], student: Artifact | None) -> list[Artifact]:
    """The teacher whose evaluation the student carries as that of its best one; its others; strangers.

    Those that were never judged, because they have features alone, come after those that were.
    """
    carried = student.manifest.files.get(f"teacher_{JUDGED}") if student is not None else None
    own = ancestors(student) if student is not None else {}

    def rank(teacher: Artifact) -> tuple[bool, bool, bool]:
        judged = teacher.manifest.files.get(JUDGED)
        is_best = carried is not None and judged is not None and judged.sha256 == carried.sha256
        return not is_best, teacher.digest not in own, judged is None

    return sorted(of_kind(artifacts, Kind.TEACHER), key=rank)
