"""The TensorRT module as a parameter: `tensorrt` on the device, `tensorrt_rtx` where there is no GPU, one interface.

Both give the same Python API. What is written against this module therefore runs in CI, up to the serialised engine,
with the very lines that run on the device.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from fmdeploy.errors import MissingDependencyError
from fmdeploy.optional import require

ApiName = Literal["tensorrt", "tensorrt-rtx"]
MODULES: dict[ApiName, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
FLOOR = (10, 3)  # JetPack 6.1; older ones need builder flags in place of types in the graph
ERRORS = ("ERROR", "INTERNAL_ERROR")
# Without a driver every error is followed by this remark, which says nothing about the error.
NO_DRIVER = re.compile(r"\s*\[checkMacros\.cpp::catchCudaError::\d+\] Error Code 1: Cuda Runtime.*$", re.DOTALL)


@dataclass(frozen=True)
class Api:
    """An imported TensorRT module."""

    name: ApiName
    module: ModuleType

    @property
    def version(self) -> str:
        """Full version, such as 10.3.0.26 (the wheel of TensorRT-RTX: 1.7.1.116)."""
        return str(self.module.__version__)


def installed(name: ApiName) -> bool:
    """Whether the package is there; it is not imported."""
    return importlib.util.find_spec(MODULES[name]) is not None


def load_api(name: ApiName) -> Api:
    """Import TensorRT or TensorRT-RTX.

    Raises:
        MissingDependencyError: it is not installed, does not import (a missing shared library is named), or is older
            than what strong typing needs.
    """
    api = Api(name, require(MODULES[name]))
    if name == "tensorrt" and version_tuple(api.version) < FLOOR:
        raise MissingDependencyError("this TensorRT is too old for types in the graph", where=api.version,
                                     expected=f">= {'.'.join(map(str, FLOOR))}", fix="Use JetPack 6.1 or newer")
    return api


def version_tuple(text: str) -> tuple[int, ...]:
    """(10, 3, 0, 26) of "10.3.0.26"; text behind the numbers is dropped."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0]))


def capturing_logger(api: Api, only: Sequence[str] = ()) -> Any:
    """Return a TensorRT logger with `messages`, a list of (severity, text), and nothing on the terminal.

    Args:
        api: TensorRT.
        only: Severities to keep; none means all. What runs for days must not keep every word.
    """

    class Log(api.module.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            api.module.ILogger.__init__(self)
            self.messages: list[tuple[str, str]] = []

        def log(self, severity: Any, msg: str) -> None:
            name = str(severity).rsplit(".", 1)[-1]
            if not only or name in only:
                self.messages.append((name, msg))

    return Log()


def error_recorder(api: Api, most: int = 64) -> Any:
    """Return an IErrorRecorder with `errors`, a list of (code, text).

    Where one is set, TensorRT reports errors to it and no longer to the logger.
    """

    class Recorder(api.module.IErrorRecorder):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            api.module.IErrorRecorder.__init__(self)
            self.errors: list[tuple[Any, str]] = []
            self.overflowed = False

        def num_errors(self) -> int:
            return len(self.errors)

        def get_error_code(self, index: int) -> Any:
            return self.errors[index][0]

        def get_error_desc(self, index: int) -> str:
            return self.errors[index][1]

        def has_overflowed(self) -> bool:
            return self.overflowed

        def clear(self) -> None:
            self.errors.clear()
            self.overflowed = False

        def report_error(self, code: Any, text: str) -> bool:  # from any thread: append is atomic
            if len(self.errors) < most:
                self.errors.append((code, text))
            else:
                self.overflowed = True
            return False  # the caller need not stop: its return value tells

    return Recorder()


def complaints(messages: Sequence[tuple[str, str]], most: int = 20) -> list[str]:
    """The errors of a log, each once, one line each."""
    texts = dict.fromkeys(one_line(text) for severity, text in messages if severity in ERRORS)
    return [text for text in texts if text][:most]


def one_line(message: str) -> str:
    """A message without line breaks and without the remark on a missing driver."""
    return " ".join(NO_DRIVER.sub("", message).split())
