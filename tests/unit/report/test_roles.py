"""What a page leads with, and in which order ancestors are named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fmdeploy.evaluate.report.roles import ancestors
from fmdeploy.manifest import Kind, Parent


def parent(kind: Kind, digest: str, **inputs: Parent) -> Parent:
    return Parent(kind=kind, stage="", digest=digest * 64, inputs=inputs)


def test_ancestors_are_named_once_and_the_nearest_first() -> None:
    data = parent(Kind.DATASET, "0")
    first = parent(Kind.TEACHER, "1", data=data)
    second = parent(Kind.TEACHER, "2", data=data, init=first)
    features, start = parent(Kind.FEATURES, "3", teacher=second), parent(Kind.STUDENT, "4", data=data)
    student: Any = SimpleNamespace(inputs={"features": features, "init": start, "teacher": second})
    assert [digest[0] for digest in ancestors(student)] == ["3", "4", "2", "0", "1"]
    assert ancestors(student)[first.digest] is first
