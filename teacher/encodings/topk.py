"""`topk:K`: the K most likely classes of an output that is read through a softmax (TinyViT, arXiv:2207.10666).

Legend: B samples, C classes, K kept ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fmdeploy.task import Array, Arrays
from fmdeploy.teacher.encodings.base import MAIN, Encoding, Part

CLASSES, REST = "classes", "rest"
FLOOR = np.float32(np.finfo(np.float16).min)


class TopK(Encoding):
    """K class numbers, their log-probabilities, and that of all others together, spread over them evenly.

    4 K + 2 bytes a sample up to 65,536 classes. Logarithms are kept, since a float16 probability near 1 could not say
    how little is left for the rest.

    With r the probability outside the K classes, the distance in total variation between the teacher's distribution
    and the one that comes back is at most r + 2⁻¹⁰ ln(K + 1): r from spreading evenly (section 3.2 there), the
    rest from rounding. It holds at temperature 1: at others the spread is again even, but the teacher's was not.
    """

    guarded = (MAIN, REST)

    def __init__(self, shape: tuple[int, ...], keep: int) -> None:
        super().__init__(shape)
        self.keep = keep
        self.number = np.dtype(np.uint16 if shape[0] <= 2**16 else np.int32)

    def parts(self) -> Mapping[str, Part]:
        """Log-probabilities, class numbers, and the log-probability of all other classes."""
        half = np.dtype(np.float16)
        return {MAIN: Part(half, (self.keep,)), CLASSES: Part(self.number, (self.keep,)), REST: Part(half, ())}

    def encode(self, value: Array) -> Arrays:
        """Parts (B, K), (B, K) and (B,) of logits (B, C); the most likely class first, ties by number."""
        logp_BC = _log_softmax(value.astype(np.float64))
        order_BC = np.argsort(-logp_BC, axis=1, kind="stable")
        kept_BK = np.take_along_axis(logp_BC, order_BC[:, : self.keep], 1)
        others_BR = np.take_along_axis(logp_BC, order_BC[:, self.keep :], 1)
        with np.errstate(divide="ignore"):  # nothing left, or less than a float64 holds
            rest_B = np.log(np.exp(others_BR).sum(1))
        return {MAIN: _half(kept_BK), CLASSES: order_BC[:, : self.keep].astype(self.number), REST: _half(rest_B)}

    def decode(self, parts: Arrays) -> Array:
        """Log-probabilities float32 (B, C), which are logits; not normalised to the last bit."""
        each_B = parts[REST].astype(np.float32) - np.float32(np.log(max(1, self.shape[0] - self.keep)))
        value_BC = np.repeat(each_B[:, None], self.shape[0], axis=1)
        np.put_along_axis(value_BC, parts[CLASSES].astype(np.int64), parts[MAIN].astype(np.float32), 1)
        return value_BC

    def compared(self, value: Array) -> Array:
        """Probabilities (B, C): logits come back shifted."""
        return np.exp(_log_softmax(value.astype(np.float64)))


def _log_softmax(logits_BC: Array) -> Array:
    shifted_BC = logits_BC - logits_BC.max(1, keepdims=True)
    return np.asarray(shifted_BC - np.log(np.exp(shifted_BC).sum(1, keepdims=True)))


def _half(x: Array) -> Array:
    return np.maximum(x, FLOOR).astype(np.float16)
