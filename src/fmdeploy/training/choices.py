"""What `NAME=WEIGHT` and `NAME.KEY=VALUE` mean on the command line: parts of a loss and their options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fmdeploy.errors import ConfigError
from fmdeploy.strictjson import loads


def name_and_weight(text: str, where: str) -> tuple[str, float]:
    """Read `NAME` (weight 1) or `NAME=WEIGHT`.

    Raises:
        ConfigError: the weight is no number above 0.
    """
    name, equal, weight = text.partition("=")
    try:
        value = float(weight) if equal else 1.0
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError("has no usable weight", where=f"{where} {text!r}", expected="NAME=WEIGHT, above 0")
    return name, value


def settings(texts: Sequence[str], what: str) -> dict[str, Mapping[str, Any]]:
    """Read `NAME.KEY=VALUE` texts: name → key → value. A value is JSON where it can be, else the text itself.

    Raises:
        ConfigError: a text is not of that form.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        path, equal, value = text.partition("=")
        name, dot, key = path.partition(".")
        if not (equal and dot and key):
            raise ConfigError("is not a setting", where=f"set {text!r}", expected=f"{what}.OPTION=VALUE")
        found.setdefault(name, {})[key] = _value(value)
    return dict(found)


def _value(text: str) -> Any:
    try:
        return loads(text.encode())
    except ValueError:
        return text
