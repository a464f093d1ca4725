"""The record of a calibration: what every tensor showed, and the range it got for which reason."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from fmdeploy.errors import ArtifactError
from fmdeploy.quantize.samples import SPLIT

FORMAT = 2


@dataclass(frozen=True)
class Candidate:
    """A range that `auto` tried on one tensor alone.

    Attributes:
        calibrators: Those that gave this range.
        amax: The range, on the float16 grid.
        db: Signal over quantisation noise at the model's outputs.
    """

    calibrators: tuple[str, ...]
    amax: float
    db: float


@dataclass(frozen=True)
class Range:
    """What one activation quantizer saw, and the `amax` it got.

    Attributes:
        low: Smallest value seen.
        high: Largest value seen.
        amax: Largest magnitude that the grid holds; 127 steps of a float16 number.
        method: The calibrator that chose it; "constant" where calibration saw one single value.
        rms: Root mean square of the values.
        max_over_rms: Largest magnitude over rms: above some tens, outliers cost most of the grid.
        percentiles: Percent of the values other than zero → the magnitude that they do not exceed.
        zeros: Share of values that are exactly zero.
        clipped: Share of values above `amax`.
        histogram: sha256 of the histogram's state.
        candidates: What `auto` measured.
    """

    low: float
    high: float
    amax: float
    method: str = "max"
    rms: float = 0.0
    max_over_rms: float = 0.0
    percentiles: dict[str, float] = field(default_factory=dict)
    zeros: float = 0.0
    clipped: float = 0.0
    histogram: str = ""
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class SmoothRow:
    """One LayerNorm whose scale moved into the Linear layers that read it, or the reason why it did not.

    Attributes:
        norm: Module name of the LayerNorm.
        readers: Module names of the Linear layers.
        low: Smallest factor by which a channel of the activation was divided.
        high: Largest factor.
        before: Largest magnitude over rms of the LayerNorm's result.
        after: The same, smoothed.
        skipped: Why nothing was done; empty where it was.
    """

    norm: str
    readers: tuple[str, ...]
    low: float = 1.0
    high: float = 1.0
    before: float = 0.0
    after: float = 0.0
    skipped: str = ""


@dataclass(frozen=True)
class ClipRow:
    """One layer whose weight ranges were narrowed.

    Attributes:
        module: Name of the Conv or Linear.
        channels: How many output channels got a narrower range.
        smallest: The narrowest range over the largest magnitude of its channel.
        before_db: Signal over weight quantisation noise at the layer's result, ranges unclipped.
        after_db: The same, clipped.
    """

    module: str
    channels: int
    smallest: float
    before_db: float
    after_db: float


@dataclass(frozen=True)
class Calibration:
    """What `calibration.json` holds.

    Attributes:
        data: Digest of the DATASET.
        digest: Of ids and values of the samples.
        seed: Of the draw.
        samples: Their ids.
        ranges: Activation quantizer → its range.
        calibrator: The one asked for.
        state: sha256 over the states of all histograms.
        smoothed: What SmoothQuant changed.
        clipped: What weight clipping changed.
        remarks: What was odd about the samples, with counts; nothing that forbids calibrating.
    """

    data: str
    digest: str
    seed: int
    samples: tuple[str, ...]
    ranges: dict[str, Range]
    calibrator: str = "max"
    state: str = ""
    smoothed: tuple[SmoothRow, ...] = ()
    clipped: tuple[ClipRow, ...] = ()
    remarks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `constant` names the tensors that calibration saw one single value of."""
        constant = sorted(name for name, row in self.ranges.items() if row.low == row.high)
        return {"format": FORMAT, "split": SPLIT, "constant": constant, **asdict(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Calibration:
        """Read back what `to_json` gave.

        Raises:
            ArtifactError: it is of another format.
        """
        if values.get("format") != FORMAT:
            raise ArtifactError("unknown calibration format", expected=FORMAT, found=values.get("format"),
                                fix="Re-run the quantize stage")
        try:
            return cls(
                values["data"], values["digest"], values["seed"], tuple(values["samples"]),
                {name: _range(row) for name, row in values["ranges"].items()}, values["calibrator"], values["state"],
                tuple(SmoothRow(**{**row, "readers": tuple(row["readers"])}) for row in values["smoothed"]),
                tuple(ClipRow(**row) for row in values["clipped"]), tuple(values["remarks"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"calibration.json lacks a field: {error}", fix="Re-run the quantize stage") from error


def _range(row: dict[str, Any]) -> Range:
    tried = tuple(Candidate(**{**each, "calibrators": tuple(each["calibrators"])}) for each in row["candidates"])
    return Range(**{**row, "candidates": tried})
