"""What a backend is: a loaded model that maps arrays to arrays, and says what really runs it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from fmdeploy.arrays import Array, Arrays
from fmdeploy.errors import FmdeployError


class Backend(Protocol):
    """One loaded model. `run` may be called by one thread at a time.

    A backend that holds memory of a device also has `close()`.
    """

    @property
    def provider(self) -> str:
        """What was asserted to run the model, such as an execution provider, with what it had to do without."""

    @property
    def threads(self) -> int:
        """Threads inside one run."""

    def run(self, feeds: Arrays) -> Sequence[Array]:
        """Run a batch: inputs (1, ...) by name to outputs (1, ...) in the order of the specification.

        The returned arrays belong to the caller; the fed ones are only read.

        Raises:
            DeviceLostError: The device is lost to this process.
            Exception: Whatever else the backend raises concerns this one frame.
        """


class DeviceLostError(FmdeployError):
    """The device fails every further call of this process: only a new process can help."""

    exit_code = 1  # neither a bug nor a part that is missing: a service manager shall start the process again


def close(backend: Backend) -> None:
    """Give back the device memory of a backend that holds any; a device that is lost has none to give back."""
    give_back = getattr(backend, "close", None)
    if give_back is not None:
        with suppress(FmdeployError):  # another tier must be able to take over
            give_back()
