"""`Inference`: a bundle that proved itself on this machine; frames in, judged results out. It knows no time.

It runs in the process that embeds it, or in the worker of a supervisor: what it says is the same in both.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from fmdeploy.arrays import Array, Arrays
from fmdeploy.runtime.bundle import Bundle
from fmdeploy.runtime.frame import Finding, Reason
from fmdeploy.runtime.guards.content import GuardConfig, Guards
from fmdeploy.runtime.tiers import choose_tier


class Result(NamedTuple):
    """What one run came to.

    Attributes:
        outputs: Output name to float32 array without batch axis; empty where nothing may be used.
        findings: What the guards and the backend said.
        tier: Tier that ran.
        model: sha256 of the model file that ran.
        provider: What really ran it.
        scores: Named numbers of the guards.
    """

    outputs: Arrays
    findings: tuple[Finding, ...]
    tier: str
    model: str
    provider: str
    scores: dict[str, float]


class Inference:
    """Guards around the first tier that was admitted here.

    Attributes:
        bundle: What it runs.
        backend: What runs it.
        tier: Tier that was admitted.
        reports: What was found about every tier, in the order they were asked for.
    """

    def __init__(
        self, bundle: Bundle, *, tiers: Sequence[str], threads: int = 1, guards: GuardConfig | None = None
    ) -> None:
        """Admit the first tier whose golden vectors pass here.

        Raises:
            ModelFileError: No tier passes.
        """
        self.bundle = bundle
        self.backend, self.tier, self.reports = choose_tier(bundle, tiers, threads)
        self.guards = Guards(bundle.io, bundle.statistics, guards or GuardConfig())
        self._model = bundle.model_sha256(self.tier)
        self._names = [spec.name for spec in bundle.io.outputs]
        self.num_backend_errors = 0

    def run(self, inputs: Arrays, *, missing: Collection[str] = (), refused: bool = False) -> Result:
        """Judge one frame's content, run it, and judge the outputs.

        Args:
            inputs: Inputs whose structure was checked.
            missing: Inputs whose sensor is not there.
            refused: The frame is invalid already: judge its content, do not run it.
        """
        feeds, findings, scores = self.guards.before(inputs, missing, refused=refused)
        outputs = self._run(feeds, findings) if feeds is not None else {}
        return Result(outputs, tuple(findings), self.tier, self._model, self.backend.provider, scores)

    def _run(self, feeds: Arrays, findings: list[Finding]) -> Arrays:
        try:
            results: Sequence[Array] = self.backend.run(feeds)
        except Exception as error:  # whatever a backend raises is one bad frame, not the end of perception
            self.num_backend_errors += 1
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            findings.append(Finding(Reason.BACKEND_ERROR, text))
            return {}
        outputs = {name: array[0] for name, array in zip(self._names, results, strict=True)}
        broken = self.guards.outputs(outputs)
        findings += broken
        return {} if broken else outputs

    def close(self) -> None:
        """Give the backend's memory back."""
        close = getattr(self.backend, "close", None)
        if close is not None:
            close()
