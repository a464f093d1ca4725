"""Objectives by name, and what `--objective` and `--set` mean."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

from fmdeploy.config import validate
from fmdeploy.errors import ConfigError
from fmdeploy.teacher.objectives.base import Objective, ObjectiveConfig
from fmdeploy.training.choices import name_and_weight
from fmdeploy.training.choices import settings as read_settings

HERE = "fmdeploy.teacher.objectives"
OBJECTIVES = {
    "supervised": "supervised:Supervised",
    "worldmodel": "worldmodel:WorldModel",
    "mae": "mae:MaskedReconstruction",
    "jepa": "jepa:Jepa",
    "selfdistill": "selfdistill:SelfDistillation",
    "contrastive": "contrastive:Contrastive",
    "flow": "flow:Flow",
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
    options = read_settings(settings, "OBJECTIVE")
    found = []
    for text in wanted:
        name, weight = name_and_weight(text, "objective")
        kind = kind_of(name)
        config = validate(kind.Config, options.pop(name, {}), where=f"objective {name}")
        found.append(Choice(kind, weight, config))
    if len({choice.kind for choice in found}) != len(found):
        raise ConfigError("an objective is given twice", where="objective", found=", ".join(wanted))
    if options:
        raise ConfigError("sets an option of an objective that is not in use", where="set", found=sorted(options)[0],
                          expected=", ".join(choice.kind.name for choice in found))
    return tuple(found)


def refuse_sharding(choices: Sequence[Choice]) -> None:
    """Refuse objectives that cannot be trained in shares.

    Raises:
        ConfigError: names the first.
    """
    if whole := [choice.kind.name for choice in choices if not choice.kind.shardable]:
        raise ConfigError(f"the objective {whole[0]} needs its whole network in each process", where="sharding",
                          found="fsdp", fix="Leave --sharding out")


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
