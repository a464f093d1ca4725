"""Objectives by name, and what `--objective` and `--set` mean."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fmdeploy.config import validate
from fmdeploy.errors import ConfigError
from fmdeploy.strictjson import loads
from fmdeploy.teacher.objectives.base import Objective, ObjectiveConfig

HERE = "fmdeploy.teacher.objectives"
OBJECTIVES = {
    "supervised": "supervised:Supervised",
}


class Choice(NamedTuple):
    """One objective of a run: its class, its weight in the sum and its options."""

    kind: type[Objective]
    weight: float
    config: ObjectiveConfig


def choose(wanted: Sequence[str], settings: Sequence[str]) -> tuple[Choice, ...]:
    """Read `--objective NAME` or `NAME=WEIGHT`, and `--set NAME.KEY=VALUE`.

    Raises:
        ConfigError: unknown name, weight or option; all with what is known.
    """
    options = _options(settings)
    found = []
    for text in wanted:
        name, _, weight = text.partition("=")
        kind = kind_of(name)
        config = validate(kind.Config, options.pop(name, {}), where=f"objective {name}")
        found.append(Choice(kind, _weight(text, weight), config))
    if len({choice.kind for choice in found}) != len(found):
        raise ConfigError("an objective is given twice", where="objective", found=", ".join(wanted))
    if options:
        raise ConfigError("sets an option of an objective that is not in use", where="set", found=sorted(options)[0],
                          expected=", ".join(choice.kind.name for choice in found))
    return tuple(found)


def kind_of(name: str) -> type[Objective]:
    """The class of the objective `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in OBJECTIVES:
        raise ConfigError("no such objective", where=f"objective {name!r}", expected=", ".join(OBJECTIVES))
    module, _, attribute = OBJECTIVES[name].partition(":")
    kind: type[Objective] = getattr(importlib.import_module(f"{HERE}.{module}"), attribute)
    return kind


def _weight(text: str, weight: str) -> float:
    try:
        value = float(weight) if weight else 1.0
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ConfigError("has no usable weight", where=f"objective {text!r}", expected="NAME=WEIGHT, above 0")
    return value


def _options(settings: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for text in settings:
        path, equal, value = text.partition("=")
        name, dot, key = path.partition(".")
        if not (equal and dot and key):
            raise ConfigError("is not a setting", where=f"set {text!r}", expected="OBJECTIVE.OPTION=VALUE")
        found.setdefault(name, {})[key] = _value(value)
    return dict(found)


def _value(text: str) -> Any:
    """A JSON value where the text is one (numbers, true, lists), else the text itself."""
    try:
        return loads(text.encode())
    except ValueError:
        return text
