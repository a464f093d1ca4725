"""The constants of the latency model: how much of its peaks a device reaches, and how far the model errs."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Efficiency(_Table):
    """Share of the dense peak that matrix products reach, by precision."""

    fp32: float = Field(gt=0, le=1.5)
    fp16: float = Field(gt=0, le=1.5)
    int8: float = Field(gt=0, le=1.5)


class Spread(_Table):
    """Half-width of the band, as |ln(measured / predicted)|, that held for networks the fit had not seen."""

    convolution: float = Field(gt=0)
    transformer: float = Field(gt=0)


class Seen(_Table):
    """Range of a call's multiply-adds in the fit, 10⁹; beyond it the band widens."""

    low: float = Field(gt=0)
    high: float = Field(gt=0)


class Constants(_Table):
    """What a fit finds."""

    source: str = Field(min_length=1, description="What it was fitted on")
    memory: float = Field(gt=0, le=1.5, description="Share of the memory bandwidth that a kernel reaches")
    launch_us: float = Field(ge=0, description="Cost of one more kernel, microseconds")
    launch_clock_mhz: float | None = Field(default=None, gt=0, description="Clock for which launch_us is meant")
    compute: Efficiency
    spread: Spread
    seen_gmac: Seen
    overhead_ms: dict[str, float] = Field(
        default_factory=dict, description="What the measuring programs added to every call; no part of a prediction")
