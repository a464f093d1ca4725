"""How many tokens an example has, and how many of a dataset's are worth counting.

Legend: S signatures, K bits.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from torch import nn

from fmdeploy.arrays import Array
from fmdeploy.data.format import Dataset
from fmdeploy.data.phash import Signatures, signatures
from fmdeploy.models.tokens import TokenBackbone
from fmdeploy.task import Task
from fmdeploy.teacher.objectives.worldmodel import WorldModelConfig

CHUNK = 512


def tokens_per_example(task: Task, module: nn.Module, world: WorldModelConfig | None = None) -> dict[str, int]:
    """What one example is to the network, in every unit that people count in.

    Args:
        task: Of the network.
        module: The teacher.
        world: Options of the world model; None: as they are by default.

    Returns:
        `frames` of the past; `patches`, the tokens of the transformer (class token left out, 0 where there is no
        such backbone); `cells` of the input maps; `codes` that the world model's tokeniser makes of the past frames;
        `targets`, cells of the dense outputs.
    """
    backbone = getattr(module, "backbone", None)
    patches = backbone.side**2 if isinstance(backbone, TokenBackbone) else 0
    codes = (world or WorldModelConfig()).grid ** 2 if patches else 0
    maps = [spec.shape for spec in task.io.inputs if len(spec.shape) == 3]
    dense = [spec.shape for spec in task.io.outputs if len(spec.shape) == 3]
    return {
        "frames": task.frames, "patches": patches, "codes": codes * task.frames,
        "cells": sum(prod(shape[1:]) for shape in maps[:1]), "targets": sum(prod(shape) for shape in dense),
    }


def effective_share(data: Dataset, split: str) -> dict[str, Any]:
    """The share of a split's frames that are left when near-duplicates are taken out.

    Frames are taken in order; one that is a near-duplicate (data/phash.py) of one already kept is dropped. Frames
    that say too little for a signature are kept, each for itself.
    """
    found = signatures(data)
    chosen = {sequence.id for sequence in data.split(split)}
    numbers = [k for k, sequence in enumerate(data.sequences) if sequence.id in chosen]
    rows = np.flatnonzero(np.isin(found.sequence_S, numbers))
    frames = sum(data.sequences[k].frames for k in numbers)
    kept = len(_distinct(found, rows))
    return {
        "frames": frames, "compared": len(rows), "near_duplicates": len(rows) - kept, "method": found.method,
        "share": (frames - len(rows) + kept) / frames,
    }


def _distinct(found: Signatures, rows: Array) -> Array:
    """Those of `rows` that are no near-duplicate of an earlier one that is kept."""
    kept: list[Array] = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        fresh = np.ones(len(chunk), bool)
        for earlier in kept:
            fresh &= ~(_distance(found, chunk, earlier) <= found.threshold).any(axis=1)
        chunk = chunk[fresh]
        near = _distance(found, chunk, chunk) <= found.threshold
        alive = np.ones(len(chunk), bool)
        for k in range(len(chunk)):
            if alive[k]:
                alive[k + 1 :] &= ~near[k, k + 1 :]
        kept.append(chunk[alive])
    return np.concatenate(kept) if kept else rows[:0]


def _distance(found: Signatures, one: Array, other: Array) -> Array:
    size = found.bits_SK.shape[1]
    return np.asarray((size - found.bits_SK[one] @ found.bits_SK[other].T) / 2)
