"""One definition for a Python function and for the command-line verb of the same name.

`@command(Config)` makes a stage callable with keyword arguments; the flags of the verb are generated from
the same model, so that the two cannot drift apart.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import click
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fmdeploy.artifact import Artifact
from fmdeploy.config import ConfigT, Internal, Positional, StageConfig, load_config, marks_of

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Outcome:
    """What a command that writes no artifact has to say."""

    lines: tuple[str, ...] = ()
    data: Any = field(default_factory=dict)
    """What --json prints: an object, for `export --lint` a list."""
    exit_code: int = 0


class Command(Generic[ConfigT, ResultT]):
    """A stage: call it with keyword arguments, or with a ready configuration through `run`."""

    def __init__(self, config: type[ConfigT], function: Callable[[ConfigT], ResultT]) -> None:
        self.config, self.run = config, function
        self.__doc__, self.__name__ = function.__doc__, function.__name__

    def __call__(self, **options: Any) -> ResultT:
        """Run with `options`, which are the fields of the configuration.

        Raises:
            ConfigError: an option is unknown or has a wrong type or value.
        """
        return self.run(load_config(self.config, options))


def command(config: type[ConfigT]) -> Callable[[Callable[[ConfigT], ResultT]], Command[ConfigT, ResultT]]:
    """Turn `function(config)` into a `Command`."""
    return lambda function: Command(config, function)


def outcome_of(result: object) -> Outcome:
    """What to print for the result of a command."""
    if isinstance(result, Outcome):
        return result
    if isinstance(result, Artifact):
        metrics = result.json("metrics.json") if result.has("metrics.json") else {}
        data = {"kind": result.kind.value, "path": str(result.root), "digest": result.digest, "metrics": metrics}
        return Outcome((f"{result.kind.value} {result.digest[:12]} at {result.root}", *metric_lines(metrics)), data)
    raise TypeError(f"a command returned {type(result).__name__}")


def metric_lines(metrics: dict[str, Any], indent: str = "  ") -> tuple[str, ...]:
    """Numbers of a nested metrics object, one a line, lists left out."""
    lines: list[str] = []
    for key, value in metrics.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", *metric_lines(value, indent + "  ")]
        elif isinstance(value, float):
            lines.append(f"{indent}{key} {value:.5g}")
        elif isinstance(value, (int, str)):
            lines.append(f"{indent}{key} {value}")
    return tuple(lines)


def click_options(model: type[StageConfig]) -> list[click.Parameter]:
    """One flag (or argument) a field; nothing is required here, since `--config` may hold it."""
    shown = [n for n, i in model.model_fields.items() if not any(isinstance(m, Internal) for m in marks_of(i))]
    return [_option(name, model) for name in shown]


def argument_lines(model: type[StageConfig]) -> str:
    """Help of the positional arguments, which click itself leaves without any."""
    infos = {n: i for n, i in model.model_fields.items() if any(isinstance(m, Positional) for m in marks_of(i))}
    return "".join(f"\n\n{name.upper()}: {info.description}." for name, info in infos.items())


def _option(name: str, model: type[StageConfig]) -> click.Parameter:
    info = model.model_fields[name]
    flag = "--" + name.replace("_", "-")
    kind, multiple = _plain_type(info.annotation)
    if any(isinstance(mark, Positional) for mark in marks_of(info)):
        return click.Argument([name], required=False, nargs=-1 if multiple else 1)
    text = (info.description or "") + _default_text(info)
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}", name], default=None, help=text)
    return click.Option([flag, name], type=_click_type(kind), multiple=multiple, default=None, help=text)


def _default_text(info: FieldInfo) -> str:
    if info.is_required():
        return " [required]"
    default = ", ".join(map(str, info.default)) if isinstance(info.default, tuple) else info.default
    return "" if default in (None, "", PydanticUndefined) else f" [default: {default}]"


def _plain_type(annotation: Any) -> tuple[Any, bool]:
    """The scalar type behind Optional, Annotated and tuple, and whether the flag repeats."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _plain_type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return _plain_type(next(a for a in arguments if a is not type(None)))
    if origin in (tuple, list, frozenset):
        return _plain_type(arguments[0])[0], True
    return annotation, False


def _click_type(kind: Any) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        return click.Choice([str(value) for value in typing.get_args(kind)])
    return {int: click.INT, float: click.FLOAT, Path: click.STRING}.get(kind, click.STRING)
