"""Losses by name, and what `--loss` and `--set` mean. Nothing heavy is imported until a loss is made."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fmdeploy.config import validate
from fmdeploy.errors import ConfigError
from fmdeploy.training.choices import name_and_weight

if TYPE_CHECKING:
    from fmdeploy.distill.losses.base import Loss

HERE = "fmdeploy.distill.losses"
LABELS = "labels"
OUTPUT_LOSSES = {"logits": "logits:Logits", "kd": "kd:Kd", "occupancy": "occupancy:Occupancy"}
MAP_LOSSES = {
    "features": "features:Features", "cosine": "cosine:Cosine", "whitened": "whitened:Whitened",
    "attention": "attention:Attention", "distance": "relational:Distance", "angle": "relational:Angle",
    "similarity": "similarity:Similarity",
}
LOSSES = (LABELS, *OUTPUT_LOSSES, *MAP_LOSSES)


class Weights(NamedTuple):
    """Name → weight of each kind of loss."""

    labels: float
    outputs: dict[str, float]
    maps: dict[str, float]


def weights_of(wanted: Sequence[str]) -> Weights:
    """Read `--loss NAME` or `NAME=WEIGHT`.

    Raises:
        ConfigError: unknown or repeated name, unusable weight; with what is known.
    """
    pairs = [name_and_weight(text, "loss") for text in wanted]
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ConfigError("a loss is given twice", where="loss", found=", ".join(wanted))
    for name in found:
        if name not in LOSSES:
            raise ConfigError("no such loss", where=f"loss {name!r}", expected=", ".join(LOSSES))
    return Weights(found.get(LABELS, 0.0), {k: v for k, v in found.items() if k in OUTPUT_LOSSES},
                   {k: v for k, v in found.items() if k in MAP_LOSSES})


def make_loss(name: str, options: Mapping[str, Any]) -> Loss:
    """The loss `name` with `options`, which are the fields of its `Config`.

    Raises:
        ConfigError: an unknown option or a wrong value.
    """
    module, _, attribute = {**OUTPUT_LOSSES, **MAP_LOSSES}[name].partition(":")
    kind: type[Loss] = getattr(importlib.import_module(f"{HERE}.{module}"), attribute)
    return kind(validate(kind.Config, options, where=f"loss {name}"))
