"""Tiers, best first; each is admitted only after its golden vectors pass on this very machine.

Legend: N golden samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmdeploy.cpu import this_cpu
from fmdeploy.errors import FmdeployError, ModelFileError
from fmdeploy.evaluate.sqnr import sqnr_db
from fmdeploy.runtime.backends.onnxrt import OrtBackend
from fmdeploy.runtime.bundle import Bundle

INT8_CPU = "int8-cpu"
TIERS = (INT8_CPU, "fp32")
WARM_UP_RUNS = 3


@dataclass(frozen=True)
class TierReport:
    """Whether a tier may run here, and why not.

    Attributes:
        variant: Model variant.
        admitted: Whether its golden vectors passed here.
        reason: Why it was refused or not tried; empty when admitted.
        sqnr_db: Smallest signal-to-noise ratio over golden samples and outputs; None when nothing ran.
        limit_db: The bundle's floor for it.
        provider: Execution provider that ran; None when nothing ran.
    """

    variant: str
    admitted: bool
    reason: str = ""
    sqnr_db: float | None = None
    limit_db: float | None = None
    provider: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; an exact match is written as 999 dB."""
        sqnr = None if self.sqnr_db is None or math.isnan(self.sqnr_db) else min(self.sqnr_db, 999.0)
        return {**self.__dict__, "sqnr_db": sqnr}


def choose_tier(bundle: Bundle, tiers: Sequence[str], threads: int) -> tuple[OrtBackend, str, tuple[TierReport, ...]]:
    """Return the first admitted tier's backend and variant, and a report on every tier.

    Raises:
        ModelFileError: No tier passes here; the text holds every reason.
    """
    reports: list[TierReport] = []
    chosen: tuple[OrtBackend, str] | None = None
    for variant in tiers:
        if chosen is not None:
            reports.append(TierReport(variant, False, f"not tried: {chosen[1]} was admitted"))
            continue
        backend, report = admit_tier(bundle, variant, threads)
        reports.append(report)
        if backend is not None:
            chosen = backend, variant
    if chosen is None:
        reasons = "; ".join(f"{report.variant}: {report.reason}" for report in reports)
        raise ModelFileError(f"no tier passes its self-test here: {reasons or 'none was asked for'}",
                             where=bundle.artifact.root)
    return chosen[0], chosen[1], tuple(reports)


def admit_tier(bundle: Bundle, variant: str, threads: int) -> tuple[OrtBackend | None, TierReport]:
    """Load one tier, warm it up and hold its golden vectors against the bundle's tolerance."""
    if variant not in bundle.variants:
        return None, TierReport(variant, False, f"the bundle has no model.{variant}.onnx")
    tolerance = bundle.golden.index.variants.get(variant)
    if tolerance is None:
        return None, TierReport(variant, False, "the bundle has no golden vectors for it")
    if reason := _saturates(bundle, variant):
        return None, TierReport(variant, False, reason)
    try:
        where = bundle.artifact.root / f"model.{variant}.onnx"
        backend = OrtBackend(bundle.model_bytes(variant), bundle.io, threads=threads, where=where)
        worst_db = golden_sqnr_db(bundle, variant, backend)
    except FmdeployError as error:
        return None, TierReport(variant, False, str(error))
    except Exception as error:  # onnxruntime's exceptions have no common public base class
        return None, TierReport(variant, False, f"the golden vectors do not run: {str(error).splitlines()[0]}")
    if not worst_db >= tolerance.sqnr_db:
        reason = f"golden vectors differ: {worst_db:.1f} dB, at least {tolerance.sqnr_db:.1f} dB needed"
        return None, TierReport(variant, False, reason, worst_db, tolerance.sqnr_db, backend.provider)
    return backend, TierReport(variant, True, "", worst_db, tolerance.sqnr_db, backend.provider)


def golden_sqnr_db(bundle: Bundle, variant: str, backend: OrtBackend) -> float:
    """Run all golden samples and return the smallest SQNR over samples and outputs, in dB; NaN counts as -inf."""
    worst = math.inf
    for number in range(len(bundle.golden)):
        feeds = {name: np.ascontiguousarray(array[None]) for name, array in bundle.golden.sample(number).items()}
        for _ in range(WARM_UP_RUNS if number == 0 else 0):
            backend.run(feeds)  # the first run allocates and is many times slower
        for spec, found in zip(bundle.io.outputs, backend.run(feeds), strict=True):
            worst = min(worst, sqnr_db(bundle.golden.outputs[variant][spec.name][number][None], found))
    return worst


def _saturates(bundle: Bundle, variant: str) -> str:
    """Why a tier would compute other numbers here on other frames than the golden ones; empty where it would not.

    The golden vectors cannot show it: saturation needs a large product, and their few frames may have none.
    """
    layers = bundle.golden.index.saturates_without_vnni
    if variant != INT8_CPU or not layers or this_cpu().exact_int8:
        return ""
    return f"this CPU has no VNNI: 8-bit products may saturate in {len(layers)} layers, such as {layers[0]}"
