"""Typed, strict configuration: one frozen model a stage, filled from TOML and flags.

Unknown keys and wrong types are errors that name the key, the closest valid one and all problems at once.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from fmdeploy.errors import ConfigError
from fmdeploy.tomlfile import read_toml as read_toml


class PathRole:
    """Marks a field that says where something lies: it is not part of what is computed."""


class RunOnly:
    """Marks a field that changes how a stage runs but never its result (workers, threads)."""


class Internal:
    """Marks a field that a stage fills in itself: the manifest has it, the command line does not."""


class Positional:
    """Marks a field that the command line takes as an argument instead of a flag: `fmdeploy check BUNDLE`."""


InputPath = Annotated[Path, PathRole()]
OutputPath = Annotated[Path, PathRole()]
# `--require-signature`, the same for every verb that opens a bundle.
RequiredKey = Annotated[InputPath | None, Field(description="Take only a bundle signed for this public key (PEM)")]

ConfigT = TypeVar("ConfigT", bound="StageConfig")


class StageConfig(BaseModel):
    """Base of every stage's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    def resolved(self) -> dict[str, Any]:
        """What goes into the manifest: every value that decides the result, defaults included."""
        dumped = self.model_dump(mode="json")
        return {name: dumped[name] for name, field in type(self).model_fields.items() if decides_result(field)}


def decides_result(field: FieldInfo) -> bool:
    """False for paths and for fields marked `RunOnly`."""
    return not any(isinstance(mark, (PathRole, RunOnly)) for mark in marks_of(field))


def marks_of(field: FieldInfo) -> list[object]:
    """What `Annotated` says about a field, also inside Optional and tuple."""
    marks = list(field.metadata)
    for argument in getattr(field.annotation, "__args__", ()):
        marks += list(getattr(argument, "__metadata__", ()))
    return marks


def load_config(model: type[ConfigT], values: Mapping[str, Any], *, file: Path | None = None) -> ConfigT:
    """Build `model` from a TOML file and from values that win over it.

    Raises:
        ConfigError: any key is unknown or any value does not fit; all problems are named.
    """
    merged = {**(read_toml(file) if file else {}), **values}
    return validate(model, merged, where=file or "configuration")


ModelT = TypeVar("ModelT", bound=BaseModel)


def validate(model: type[ModelT], values: Mapping[str, Any], *, where: object) -> ModelT:
    """Strict validation (no silent casts) of plain values into any pydantic model.

    Raises:
        ConfigError: with every problem in one line.
    """
    try:
        text = json.dumps(dict(values), default=_jsonable)
    except (TypeError, ValueError) as error:  # not a mapping at all, or values that JSON does not have
        raise ConfigError(f"holds a value that no configuration can hold: {error}", where=where) from error
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise ConfigError("; ".join(_problems(model, error)), where=where) from error


def _jsonable(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} {value!r}")


def _problems(model: type[BaseModel], error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        key = ".".join(map(str, item["loc"])) or "(all)"
        if item["type"] == "extra_forbidden":
            yield f"unknown key {key!r}{_closest(model, str(item['loc'][-1]))}"
        elif item["type"] == "missing":
            yield f"{key!r} is required"
        else:
            yield f"{key!r}: {item['msg'].removeprefix('Value error, ').lower()}, found {item['input']!r}"


def _closest(model: type[BaseModel], key: str) -> str:
    near = difflib.get_close_matches(key, model.model_fields, n=1)
    return f", did you mean {near[0]!r}?" if near else f" (known: {', '.join(model.model_fields)})"
