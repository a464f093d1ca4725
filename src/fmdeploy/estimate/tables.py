"""Writing device files and constants as TOML."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from fmdeploy.estimate.constants import Constants
from fmdeploy.estimate.devices import DeviceFile


def constants_toml(constants: Constants) -> str:
    """The text of a file of constants; reading it gives back an equal object."""
    return "\n".join(_lines(constants)) + "\n"


def device_toml(file: DeviceFile) -> str:
    """The text of a device file; reading it gives back an equal object."""
    return "\n".join(_lines(file)) + "\n"


def _lines(table: BaseModel, prefix: str = "") -> Iterator[str]:
    """Plain values first, then tables, then arrays of tables: the order that TOML asks for."""
    values = {key: getattr(table, key) for key in type(table).model_fields}
    for key, value in values.items():
        if isinstance(value, (str, int, float, dict)) and value != {}:
            yield f"{key} = {_plain(value)}"
    for key, value in values.items():
        if isinstance(value, BaseModel):
            yield from ("", f"[{prefix}{key}]", *_lines(value, f"{prefix}{key}."))
    for key, value in values.items():
        for item in value if isinstance(value, tuple) else ():
            yield from ("", f"[[{prefix}{key}]]", *_lines(item, f"{prefix}{key}."))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_plain(key)} = {_plain(one)}" for key, one in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)
