"""`uint8`: the probability of each cell of a dense output in steps of 1/255.

Legend: B samples, `...` planes, rows, columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fmdeploy.task import Array, Arrays
from fmdeploy.teacher.encodings.base import MAIN, Encoding, Part

STEPS = 255


class Probability(Encoding):
    """For logits that are read through a sigmoid: |error of the probability| ≤ 1/510.

    Half the bytes of float16. A cell that rounds to 0 or to 1 comes back as the logit of 1/1020 or of its complement,
    the middle of what rounds there, ±6.9: logits beyond that are cut, and their probabilities stay within the bound.
    """

    def parts(self) -> Mapping[str, Part]:
        """One array."""
        return {MAIN: Part(np.dtype(np.uint8), self.shape)}

    def encode(self, value: Array) -> Arrays:
        """Probabilities times 255 (B, ...)."""
        import torch

        chance = torch.sigmoid(torch.from_numpy(value).double())  # double: the bound holds to the last step
        return {MAIN: torch.round(chance * STEPS).to(torch.uint8).numpy()}

    def decode(self, parts: Arrays) -> Array:
        """Logits float32 (B, ...), from a table of 256."""
        return TABLE[parts[MAIN]]

    def compared(self, value: Array) -> Array:
        """Probabilities (B, ...): logits come back cut."""
        return np.asarray(1 / (1 + np.exp(-np.clip(value.astype(np.float64), -60, 60))))


def _table() -> Array:
    chance = np.clip(np.arange(STEPS + 1) / STEPS, 0.25 / STEPS, 1 - 0.25 / STEPS)
    return np.log(chance / (1 - chance)).astype(np.float32)


TABLE = _table()
