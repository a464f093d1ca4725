"""`placement.toml`: the placement as a person reads and edits it.

    [[layer]]  name, kind, precision = "int8" | "float", why       every conv, linear and sum
    [[tensor]] name, calibrator, shares = [...], and what was measured of it

`fmdeploy quantize --placement FILE` obeys the layers' `precision` and the tensors' `calibrator`; what the file leaves
out is decided by rule. All else in it is for the reader. What no file can ask for is refused by name: INT8 for a
transposed convolution, for a sum that no INT8 layer feeds or that is no residual, for a weight computed in `forward`.
An output head in INT8 is obeyed, and so is a residual stream of a transformer: they are possible, if unwise.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from fmdeploy.config import read_toml, validate
from fmdeploy.errors import ConfigError
from fmdeploy.quantize.calibrators import Calibrator
from fmdeploy.quantize.placement import ADD, Placement, Precision, Table, TensorRow, Wish

HEADER = """\
# What runs in INT8 and what stays in float. Edit a precision or a calibrator and give the file back:
#     fmdeploy quantize ... --placement FILE
# precision: "int8" or "float". calibrator: "default" (what --calibrator says), "max", "entropy", "percentile", "mse"
# or "auto". Everything else is for the reader.
"""


class LayerEntry(BaseModel):
    """One `[[layer]]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    precision: Precision
    kind: str = ""
    why: str = ""


class TensorEntry(BaseModel):
    """One `[[tensor]]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    calibrator: Calibrator | Literal["default"] = "default"
    shares: tuple[str, ...] = ()
    max: float | None = None
    rms: float | None = None
    max_over_rms: float | None = None
    p999: float | None = None
    reader_db: float | None = None


class PlacementFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = ""
    reason: str = ""
    layer: tuple[LayerEntry, ...] = ()
    tensor: tuple[TensorEntry, ...] = ()


def read_placement(path: Path) -> Table:
    """Read a placement file; whether its names exist shows when the model is quantised.

    Raises:
        ConfigError: it is missing, not TOML, has unknown keys or wrong values, or lists a name twice.
    """
    found = validate(PlacementFile, read_toml(path), where=path)
    for what, names in (("layer", [row.name for row in found.layer]), ("tensor", [row.name for row in found.tensor])):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ConfigError(f"[[{what}]] {twice[0]!r} is listed twice", where=path)
    return Table(
        {row.name: Wish(row.precision, row.why if row.precision == "float" else "") for row in found.layer},
        {row.name: row.calibrator for row in found.tensor if row.calibrator != "default"},
        str(path),
    )


def to_toml(placement: Placement) -> str:
    """Spell a placement as `placement.toml`; `read_placement` of it asks for the same placement again."""
    blocks = [HEADER + _assignments({"method": placement.method, "reason": placement.reason or ""})]
    blocks += [f"[[layer]]\n{_assignments(row)}" for row in _layers(placement)]
    blocks += [f"[[tensor]]\n{_assignments(row)}" for row in _tensors(placement)]
    return "\n".join(blocks)


def _layers(placement: Placement) -> Iterator[dict[str, Any]]:
    yield from ({"name": row.module, "kind": row.kind, "precision": "int8"} for row in placement.weights)
    yield from ({"name": name, "kind": ADD, "precision": "int8"} for name in placement.adds)
    first = {row.name: row for row in reversed(placement.floats)}  # a module called twice has several rows, one name
    yield from ({"name": name, "kind": first[name].kind, "precision": "float", "why": first[name].why}
                for name in dict.fromkeys(row.name for row in placement.floats))


def _tensors(placement: Placement) -> Iterator[dict[str, Any]]:
    rows = {row.tensor: row for row in placement.measured}
    for activation in placement.activations:
        name, *others = activation.tensors
        worst = min((rows[t] for t in activation.tensors if t in rows), key=lambda row: row.reader_db, default=None)
        yield {"name": name, "calibrator": activation.calibrator or "default", "shares": others, **_numbers(worst)}


def _numbers(row: TensorRow | None) -> dict[str, float]:
    if row is None:
        return {}
    ratio = row.max / row.rms if row.rms else 0.0
    return {key: float(f"{value:.4g}") for key, value in (
        ("max", row.max), ("rms", row.rms), ("max_over_rms", ratio), ("p999", row.p999),
        ("reader_db", row.reader_db))}


def _assignments(values: dict[str, Any]) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in values.items() if value != [])


def _value(value: str | float | Iterable[str]) -> str:
    """A TOML value. JSON escapes strings alike, but for DEL."""
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
