"""What an encoding costs: cosine, SQNR and bytes, from sums that shards carry in their headers.

Legend: B samples, C channels, `...` the rest of one sample's shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fmdeploy.task import Array
from fmdeploy.teacher.encodings.base import Encoding

SAMPLED = 4
"""Samples of each shard, its first ones, whose error is measured (fewer where a block of the writer holds fewer).

Reading back all would double the work.
"""

Sums = dict[str, float]


def error_sums(value: Array, decoded: Array) -> Sums:
    """Sums over the tokens of maps (B, C, ...): of their cosines, of signal and of noise energy.

    Args:
        value: What the teacher said, float32 (B, C, ...).
        decoded: What comes back.
    """
    tokens, back = (x.reshape(*x.shape[:2], -1).astype(np.float64) for x in (value, decoded))
    product = (tokens * back).sum(1)
    length = np.sqrt(np.square(tokens).sum(1) * np.square(back).sum(1))
    cosine = np.where(length > 0, product / np.where(length > 0, length, 1), np.all(tokens == back, axis=1))
    return {"tokens": float(cosine.size), "cosine": float(cosine.sum()), "signal": float(np.square(tokens).sum()),
            "noise": float(np.square(tokens - back).sum())}


def summary(sums: Iterable[Mapping[str, float]], encoding: Encoding) -> dict[str, Any]:
    """Mean cosine of a token, SQNR in dB (None where nothing was lost) and bytes a sample."""
    total = {"tokens": 0.0, "cosine": 0.0, "signal": 0.0, "noise": 0.0}
    for part in sums:
        total = {key: value + part[key] for key, value in total.items()}
    sqnr = 10 * math.log10(total["signal"] / total["noise"]) if total["noise"] and total["signal"] else None
    return {"bytes_per_sample": sum(part.size for part in encoding.parts().values()),
            "cosine": total["cosine"] / max(total["tokens"], 1), "sqnr_db": sqnr}
