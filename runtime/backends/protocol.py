"""What a backend is: a loaded model that maps arrays to arrays, and says what really runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fmdeploy.arrays import Array, Arrays


class Backend(Protocol):
    """One loaded model. `run` may be called by one thread at a time."""

    @property
    def provider(self) -> str:
        """The execution provider that was asserted to run the model."""

    @property
    def threads(self) -> int:
        """Threads inside one run."""

    def run(self, feeds: Arrays) -> Sequence[Array]:
        """Run a batch: inputs (1, ...) by name to outputs (1, ...) in the order of the specification.

        The returned arrays belong to the caller; the fed ones are only read.
        """
