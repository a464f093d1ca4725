"""What `check` measures about one tier: accuracy through the runtime itself, golden vectors, flags on clean data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fmdeploy.arrays import Arrays
from fmdeploy.errors import DataError, ModelFileError
from fmdeploy.evaluate.evaluation import Evaluation, evaluate
from fmdeploy.progress import Bar
from fmdeploy.runtime.bundle import Bundle
from fmdeploy.runtime.guards.content import SAMPLES
from fmdeploy.runtime.loading import Terms
from fmdeploy.runtime.session import Runtime
from fmdeploy.runtime.state import INDEPENDENT
from fmdeploy.runtime.tiers import TierReport, admit_tier
from fmdeploy.task import Metric, Samples


@dataclass
class CheckedTier:
    """One tier, as found here.

    Attributes:
        name: Variant.
        report: Self-test result.
        runtime: The running tier; None when it was refused.
        evaluation: Its evaluation; None when it was refused.
        flags: How many frames of the evaluation carried each reason code: the guards' false alarms on clean data.
        num_invalid: Frames of the evaluation that the runtime called not valid, though it gave outputs.
        evaluator: The same tier with the guards of an evaluation; None when it was refused.
    """

    name: str
    report: TierReport
    runtime: Runtime | None = None
    evaluation: Evaluation | None = None
    flags: Counter[str] = field(default_factory=Counter)
    num_invalid: int = 0
    evaluator: Runtime | None = None

    @property
    def invalid_share(self) -> float | None:
        """Share of the evaluation's frames that were not valid; None when nothing was evaluated."""
        return self.num_invalid / len(self.evaluation) if self.evaluation is not None else None


def check_tier(
    bundle: Bundle, name: str, samples: Samples, metrics: Sequence[Metric], *, threads: int, data: str, bar: Bar,
    terms: Terms | None = None,
) -> CheckedTier:
    """Start one tier and evaluate it, frame by frame, through `Runtime.infer`.

    All guards are on but the one for frozen sensors: samples are no stream, and two of them may be equal. (A sensor
    must not repeat itself, so the runtime that is timed has that one, too.)

    Raises:
        DataError: A sample is such that the runtime gives no outputs for it.
    """
    try:
        runtime = Runtime(bundle, tiers=(name,), threads=threads, terms=terms)
    except ModelFileError:
        return CheckedTier(name, admit_tier(bundle, name, threads, terms)[1])
    evaluator = Runtime(bundle, tiers=(name,), threads=threads, guards=SAMPLES, policy=INDEPENDENT, terms=terms)
    checked = CheckedTier(name, runtime.reports[0], runtime, evaluator=evaluator)
    checked.evaluation = evaluate(Predictor(checked, bar), samples, metrics, data=data)
    return checked


class Predictor:
    """Maps a batch of inputs to outputs through the runtime of a tier, and counts the flags unless told not to."""

    def __init__(self, tier: CheckedTier, bar: Bar | None = None, *, count: bool = True) -> None:
        self.tier, self.bar, self.count = tier, bar, count

    def __call__(self, inputs: Arrays) -> Arrays:
        """Run (B, ...) inputs to (B, ...) outputs.

        Raises:
            DataError: A frame was refused.
        """
        runtime = self.tier.evaluator
        assert runtime is not None
        rows: list[Arrays] = []
        for row in range(len(next(iter(inputs.values())))):
            frame = runtime.infer({name: array[row] for name, array in inputs.items()})
            if self.count:
                self.tier.flags.update({reason.value for reason in frame.reasons})
                self.tier.num_invalid += not frame.valid
            if not frame.outputs:
                text = "; ".join(f"{found.code.value} {found.detail}" for found in frame.findings)
                raise DataError(f"the runtime refuses an evaluation sample: {text}", where=f"tier {self.tier.name}")
            rows.append(frame.outputs)
            if self.bar is not None:
                self.bar.advance()
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
