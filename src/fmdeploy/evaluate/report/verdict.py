"""The header: pass, fail or not measured, and the table of gates behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fmdeploy.evaluate.gates import Result, Row, gates_pass
from fmdeploy.evaluate.report.sources import Sources
from fmdeploy.evaluate.report.words import quantity, span

SYMBOLS = {Result.PASS: "✓", Result.FAIL: "✗", Result.NOT_MEASURED: "?"}
NOT_GIVEN = "not given"


@dataclass(frozen=True)
class Gate:
    """One gate as the table prints it."""

    title: str
    result: str
    symbol: str
    value: str
    limit: str
    interval: str
    samples: str
    reason: str
    blocks: bool


@dataclass(frozen=True)
class Verdict:
    """The result over all gates, in words, and the gates: overall first, slices apart."""

    result: str
    sentence: str
    overall: tuple[Gate, ...]
    slices: tuple[Gate, ...]

    @property
    def css(self) -> str:
        """The class of the badge."""
        return self.result.replace(" ", "-")


def verdict_of(sources: Sources) -> Verdict:
    """Only a CHECK can pass; without one there is no verdict."""
    rows = sources.rows()
    if not sources.checks:
        return Verdict(NOT_GIVEN, "No CHECK was given: nothing here was held against a budget.", (), ())
    failed = [row for row in rows if row.result is Result.FAIL]
    unknown = [row for row in rows if row.result is Result.NOT_MEASURED and row.required]
    optional = [row for row in rows if row.result is Result.NOT_MEASURED and not row.required]
    passed = Result.PASS if gates_pass(rows) else Result.NOT_MEASURED
    result = Result.FAIL if failed else passed
    sentence = _sentence(rows, failed, unknown, optional)
    gates = [(row, _gate(row)) for row in rows]
    return Verdict(result.value, sentence, tuple(g for row, g in gates if row.slice is None),
                   tuple(g for row, g in gates if row.slice is not None))


def _sentence(rows: Sequence[Row], failed: Sequence[Row], unknown: Sequence[Row], optional: Sequence[Row]) -> str:
    passed = sum(row.result is Result.PASS for row in rows)
    parts = [f"{passed} of {len(rows)} gates passed"]
    if failed:
        parts.append(f"{len(failed)} failed")
    if unknown:
        parts.append(f"{len(unknown)} not measured, which does not pass")
    if optional:
        parts.append(f"{len(optional)} too small to judge, which does not block")
    return ", ".join(parts) + "."


def _gate(row: Row) -> Gate:
    interval = "" if row.interval is None else span(*row.interval, row.unit)
    samples = "" if row.n_samples is None else str(row.n_samples)
    sign = "≥" if row.unit == "dB" else "≤"
    limit = "–" if row.limit is None else f"{sign} {quantity(row.limit, row.unit)}"
    return Gate(row.title, row.result.value, SYMBOLS[row.result], quantity(row.value, row.unit), limit, interval,
                samples, row.reason, row.blocks)
