"""Tiers, best first; each is admitted only by what it shows on this very machine.

    golden vectors    every output of every golden sample is as close as the bundle says
    repeatability     two runs of one input agree: in every bit on a CPU, within that tolerance on a GPU
    latency           where a budget applies: the fastest of the timed runs, and of as many again, is within its median
    memory            where a budget applies: what came on top at the worst moment is within its peak

Latency refuses by the *fastest* run. At the start of a vehicle's computer everything else starts, too, and a median
taken then would refuse a tier that is fast enough a minute later; but a tier whose best run is over the budget never
holds it. In between the tier is admitted with a note, and the deadlines judge its frames one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fmdeploy.budgets import TargetBudget
from fmdeploy.cpu import this_cpu
from fmdeploy.errors import FmdeployError, ModelFileError, first_line
from fmdeploy.runtime.backends.protocol import Backend, close
from fmdeploy.runtime.bundle import Bundle
from fmdeploy.runtime.loading import Terms, Tier, load_backend
from fmdeploy.runtime.trial import (
    MemoryMark,
    Shown,
    budget_here,
    golden_sqnr_db,
    more_times,
    peak_growth_mib,
    require_answers,
    trial,
)

INT8_CPU = "int8-cpu"
# OpenVINO runs the file for TensorRT. On large networks it can be the faster one of the two on a CPU; on the demo's it
# takes 1.6 times as long and starts slower, so it stands behind: it is what a CPU without VNNI has left in 8 bits.
TABLE = {
    tier.name: tier
    for tier in (
        Tier("trt-int8", "tensorrt", "int8"),
        Tier("trt-fp16", "tensorrt", "fp16"),
        Tier("cuda-fp16", "cuda", "fp16"),
        Tier(INT8_CPU, "cpu", INT8_CPU),
        Tier("openvino-int8", "openvino", "int8"),
        Tier("fp32", "cpu", "fp32"),
    )
}
TIERS = tuple(TABLE)


@dataclass(frozen=True)
class TierReport:
    """Whether a tier may run here, and why not.

    Attributes:
        tier: Its name.
        admitted: Whether it passed here.
        reason: Why it was refused or not tried; empty when admitted.
        sqnr_db: Smallest signal-to-noise ratio over golden samples and outputs; None when nothing ran.
        limit_db: The bundle's floor for it.
        provider: What really ran it; None when nothing ran.
        p50_ms: Median of the timed runs, without guards; None when nothing ran.
        best_ms: The fastest of them.
        n: How many there were.
        mib: Memory that came on top at the worst moment; None when nothing ran or the kernel does not say.
        note: What is worth knowing about an admitted tier.
    """

    tier: str
    admitted: bool
    reason: str = ""
    sqnr_db: float | None = None
    limit_db: float | None = None
    provider: str | None = None
    p50_ms: float | None = None
    best_ms: float | None = None
    n: int = 0
    mib: float | None = None
    note: str = ""

    @property
    def variant(self) -> str:
        """Model file of the bundle that it runs."""
        return tier_named(self.tier).variant

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; an exact match is written as 999 dB."""
        sqnr = None if self.sqnr_db is None or math.isnan(self.sqnr_db) else max(min(self.sqnr_db, 999.0), -999.0)
        return {**self.__dict__, "variant": self.variant, "sqnr_db": sqnr}


def tier_named(name: str) -> Tier:
    """The tier of that name; a name that is not in the table is a model file, run by ONNX Runtime on the CPU."""
    return TABLE.get(name) or Tier(name, "cpu", name)


def choose_tier(
    bundle: Bundle, tiers: Sequence[str], threads: int, terms: Terms | None = None
) -> tuple[Backend, str, tuple[TierReport, ...]]:
    """Return the first admitted tier's backend and name, and a report on every tier.

    Raises:
        ModelFileError: No tier passes here; the text holds every reason.
    """
    reports: list[TierReport] = []
    chosen: tuple[Backend, str] | None = None
    for name in tiers:
        if chosen is not None:
            reports.append(TierReport(name, False, f"not tried: {chosen[1]} was admitted"))
            continue
        backend, report = admit_tier(bundle, name, threads, terms)
        reports.append(report)
        if backend is not None:
            chosen = backend, name
    if chosen is None:
        reasons = "; ".join(f"{report.tier}: {report.reason}" for report in reports)
        raise ModelFileError(f"no tier passes its self-test here: {reasons or 'none was asked for'}",
                             where=bundle.artifact.root)
    return chosen[0], chosen[1], tuple(reports)


def admit_tier(
    bundle: Bundle, name: str, threads: int, terms: Terms | None = None
) -> tuple[Backend | None, TierReport]:
    """Load one tier, and let it show what it must show; a refused one keeps no memory of a device.

    Raises:
        ConfigError: the budgets have no target of the name in `terms`.
    """
    tier, terms = tier_named(name), terms or Terms()
    budget = budget_here(bundle, terms.target)
    before = MemoryMark.now(terms.root)
    try:
        limit_db = require_answers(bundle, tier.variant)
        if reason := _saturates(bundle, tier.name):
            return None, TierReport(name, False, reason)
        backend, note = load_backend(bundle, tier, threads, terms)
    except FmdeployError as error:
        return None, TierReport(name, False, str(error))
    report = TierReport(name, False, limit_db=limit_db, provider=backend.provider, note=note)
    report = _tried(bundle, tier, backend, report, budget)
    if report.n:
        report = _within_memory(replace(report, mib=peak_growth_mib(before, MemoryMark.now(terms.root))), budget)
    if report.admitted:
        return backend, report
    close(backend)
    return None, report


def self_test(bundle: Bundle, tier: str, backend: Backend, provider: str, numbers: Sequence[int]) -> TierReport:
    """Hold golden samples against a backend that runs already; nothing is timed."""
    report = TierReport(tier, False, limit_db=require_answers(bundle, tier_named(tier).variant), provider=provider)
    try:
        worst_db = golden_sqnr_db(bundle, tier_named(tier).variant, backend, numbers)
    except Exception as error:  # see `_tried`
        return replace(report, reason=_does_not_run(error))
    return _judged(replace(report, sqnr_db=worst_db))


def _tried(bundle: Bundle, tier: Tier, backend: Backend, report: TierReport, budget: TargetBudget | None) -> TierReport:
    repeat_db = math.inf if tier.bit_equal else float(report.limit_db or 0)
    try:
        shown = trial(bundle, tier.variant, backend, repeat_db=repeat_db)
        if budget is not None and budget.p50_ms is not None and shown.best_ms > budget.p50_ms:
            shown = more_times(bundle, backend, shown)
    except Exception as error:  # onnxruntime's exceptions have no common public base class
        return replace(report, reason=_does_not_run(error))
    report = replace(report, sqnr_db=shown.worst_db, p50_ms=shown.p50_ms, best_ms=shown.best_ms, n=len(shown.times_ms))
    judged = _judged(report)
    if judged.admitted and shown.unrepeatable:
        return replace(judged, admitted=False, reason=f"not repeatable: {shown.unrepeatable}")
    return _within_latency(judged, shown, budget)


def _does_not_run(error: Exception) -> str:
    return f"the golden vectors do not run: {first_line(error)}"


def _judged(report: TierReport) -> TierReport:
    assert report.sqnr_db is not None
    assert report.limit_db is not None
    if not report.sqnr_db >= report.limit_db:
        reason = f"golden vectors differ: {report.sqnr_db:.1f} dB, at least {report.limit_db:.1f} dB needed"
        return replace(report, reason=reason)
    return replace(report, admitted=True)


def _within_latency(report: TierReport, shown: Shown, budget: TargetBudget | None) -> TierReport:
    limit = budget.p50_ms if budget is not None else None
    if not report.admitted or limit is None or shown.p50_ms <= limit:
        return report
    text = f"best {shown.best_ms:.2f} ms, median {shown.p50_ms:.2f} ms of {report.n} runs, the budget is {limit:g} ms"
    if shown.best_ms > limit:
        return replace(report, admitted=False, reason=f"too slow: {text}")
    return replace(report, note="; ".join(part for part in (report.note, f"the machine is busy: {text}") if part))


def _within_memory(report: TierReport, budget: TargetBudget | None) -> TierReport:
    limit = budget.peak_mib if budget is not None else None
    if not report.admitted or limit is None:
        return report
    if report.mib is None:
        return replace(report, admitted=False, reason="its memory cannot be measured here, and the budget limits it")
    if report.mib > limit:
        return replace(report, admitted=False,
                       reason=f"takes too much memory: {report.mib:.0f} MiB at its peak, the budget is {limit:g} MiB")
    return report


def _saturates(bundle: Bundle, tier: str) -> str:
    """Why a tier would compute other numbers here on other frames than the golden ones; empty where it would not.

    The golden vectors cannot show it: saturation needs a large product, and their few frames may have none.
    """
    layers = bundle.golden.index.saturates_without_vnni
    if tier != INT8_CPU or not layers or this_cpu().exact_int8:
        return ""
    return f"this CPU has no VNNI: 8-bit products may saturate in {len(layers)} layers, such as {layers[0]}"
