"""The placement table: what runs in INT8, what stays float and why, and what was asked for.

`policy.place` decides it, `build.apply` puts it into a graph, `placementfile` spells it for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fmdeploy.errors import ArtifactError
from fmdeploy.quantize.calibrators import Calibrator

FORMAT = 2
TRANSPOSED_WHY = "TensorRT runs ConvTranspose in float"
ADD = "add"  # the kind of a residual sum, beside the class names of layers

Method = Literal["fx", "export", "modules"]
Precision = Literal["int8", "float"]


@dataclass(frozen=True)
class ActivationRow:
    """One activation quantizer: the tensors it stands at, who reads them, and a calibrator of its own if it has one."""

    quantizer: str
    tensors: tuple[str, ...]
    readers: tuple[str, ...]
    calibrator: Calibrator | None = None


@dataclass(frozen=True)
class WeightRow:
    """One weight quantizer, per output channel."""

    module: str
    kind: str
    channels: int


@dataclass(frozen=True)
class FloatRow:
    """A layer or sum that stays float, and why; `name` is the module's, or the node's where there is no module."""

    node: str
    why: str
    name: str
    kind: str


@dataclass(frozen=True)
class TensorRow:
    """What the outlier probe measured of one activation tensor, see `outliers`."""

    tensor: str
    max: float
    rms: float
    p999: float
    reader_db: float


@dataclass(frozen=True)
class Wish:
    """What a placement file says of one layer or sum."""

    precision: Precision
    why: str = ""


@dataclass(frozen=True)
class Table:
    """What a placement file says: layers and sums by name, calibrators by tensor, and which file it was."""

    layers: Mapping[str, Wish]
    calibrators: Mapping[str, Calibrator]
    where: str


@dataclass(frozen=True)
class Request:
    """What a user asks of the placement; everything else is decided by rule.

    `keep_float` names conv and linear modules (such as "stem.0") and sums. `quantise_heads` quantises the last layers
    before the outputs, too. `table` is a placement file, whose word is final but for `keep_float`.
    """

    keep_float: tuple[str, ...] = ()
    quantise_heads: bool = False
    table: Table | None = None


@dataclass(frozen=True)
class Placement:
    """The whole table.

    `method` says how the graph was read: "fx" (torch.fx), "export" (torch.export), or "modules" where neither could
    follow `forward` and single modules are quantised. `reason` says why it was not "fx", with the source line.
    """

    method: Method
    reason: str | None
    activations: tuple[ActivationRow, ...]
    weights: tuple[WeightRow, ...]
    adds: tuple[str, ...]
    floats: tuple[FloatRow, ...]
    measured: tuple[TensorRow, ...] = field(default=())

    @property
    def calibrators(self) -> dict[str, Calibrator]:
        """Tensor → calibrator, for the tensors that have one of their own."""
        return {t: row.calibrator for row in self.activations for t in row.tensors if row.calibrator is not None}

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Placement:
        """Read back what `to_json` gave.

        Raises:
            ArtifactError: the format is another one, or a field is missing.
        """
        if values.get("format") != FORMAT:
            raise ArtifactError("unknown placement format", expected=FORMAT, found=values.get("format"),
                                fix="Re-run the quantize stage")
        try:
            return cls(
                values["method"],
                values["reason"],
                tuple(ActivationRow(r["quantizer"], tuple(r["tensors"]), tuple(r["readers"]), r["calibrator"])
                      for r in values["activations"]),
                tuple(WeightRow(**row) for row in values["weights"]),
                tuple(values["adds"]),
                tuple(FloatRow(**row) for row in values["floats"]),
                tuple(TensorRow(**row) for row in values["measured"]),
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"placement.json lacks a field: {error}", fix="Re-run the quantize stage") from error
