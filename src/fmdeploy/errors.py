"""Every error a user can cause or meet, in one tree.

    FmdeployError            exit 4   a bug in fmdeploy (also any other exception)
    ├── GateError            exit 1   a gate failed, or was not measured
    ├── LeakageError         exit 1   data that must be apart is not
    ├── InputError           exit 2   bad usage or bad input
    │   ├── ConfigError               unknown key, wrong type, value out of range
    │   ├── ArtifactError             missing, truncated, foreign, altered, already there
    │   ├── DataError                 samples, splits, calibration sets
    │   ├── FrameError                one frame given to the runtime
    │   └── ModelFileError            ONNX files and weights
    └── MissingError         exit 3   something this needs is not here
        ├── MissingDependencyError    a package (also an ImportError)
        └── NoSpaceError              disk full
"""

from __future__ import annotations

from functools import partial
from typing import Any


class FmdeployError(Exception):
    """One line that says where, what, expected against found, and the next step."""

    exit_code = 4
    told = False
    """Whether another process of the same run has told it."""

    def __init__(
        self, what: str, *, where: object = None, expected: object = None, found: object = None, fix: str | None = None
    ) -> None:
        self.what, self.where, self.expected, self.found, self.fix = what, where, expected, found, fix
        super().__init__(what, where, expected, found, fix)

    def __reduce__(self) -> tuple[Any, ...]:
        """As pickle wants it, for other processes."""
        rebuild = partial(type(self), where=self.where, expected=self.expected, found=self.found, fix=self.fix)
        return rebuild, (self.what,), vars(self)

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        facts = [f"{k} {v}" for k, v in (("expected", self.expected), ("found", self.found)) if v is not None]
        text += f" ({', '.join(facts)})" if facts else ""
        text += f". {self.fix}" if self.fix else ""
        return " ".join(text.split())


def first_line(error: BaseException) -> str:
    """The first line of what a library raised; its type where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class GateError(FmdeployError):
    """A gate failed or was not measured."""

    exit_code = 1


class LeakageError(FmdeployError):
    """Samples that must be apart share a sequence, a seed or their content."""

    exit_code = 1


class InputError(FmdeployError):
    """Bad usage or bad input: the user can fix it."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration has an unknown key, a wrong type or a value out of range."""


class ArtifactError(InputError):
    """An artifact is missing, truncated, of another kind, altered, or already there."""


class DataError(InputError):
    """A dataset, split, sample or calibration set cannot be used."""


class FrameError(InputError):
    """A frame given to the runtime breaks the input specification."""


class ModelFileError(InputError):
    """A model file cannot be used."""


class MissingError(FmdeployError):
    """Something that this needs is not on this machine."""

    exit_code = 3


class MissingDependencyError(MissingError, ImportError):
    """A package is not installed."""


class NoSpaceError(MissingError):
    """The disk is full."""
