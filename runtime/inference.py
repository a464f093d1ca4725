"""`Inference`: a bundle that proved itself on this machine; frames in, judged results out. It knows no time.

It runs in the process that embeds it, or in the worker of a supervisor: what it says is the same in both.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import NamedTuple

from fmdeploy.arrays import Array, Arrays
from fmdeploy.errors import ModelFileError, first_line
from fmdeploy.runtime.backends.protocol import Backend, DeviceLostError, close
from fmdeploy.runtime.bundle import Bundle
from fmdeploy.runtime.frame import WARNINGS, Finding, Reason
from fmdeploy.runtime.guards.content import GuardConfig, Guards
from fmdeploy.runtime.loading import Terms
from fmdeploy.runtime.tiers import TierReport, admit_tier, choose_tier, self_test, tier_named
from fmdeploy.runtime.trial import golden_feeds

CLEARLY_FASTER = 0.8


class Result(NamedTuple):
    """What one run came to.

    Attributes:
        outputs: Output name to float32 array without batch axis; empty where nothing may be used.
        findings: What the guards and the backend said.
        tier: Tier that ran.
        model: sha256 of the model file that ran.
        provider: What really ran it.
        scores: Named numbers of the guards.
        innocent: The backend raised on this frame, but not on the golden input: the frame is to blame.
    """

    outputs: Arrays
    findings: tuple[Finding, ...]
    tier: str
    model: str
    provider: str
    scores: dict[str, float]
    innocent: bool = False


class Running(NamedTuple):
    """What runs now; replaced as one, so that no result mixes two tiers."""

    backend: Backend
    tier: str
    model: str
    provider: str


class Inference:
    """Guards around the first tier that was admitted here, and around a later one when that fails.

    `run`, `use` and `self_test` are for one thread at a time; `admit` and `prepare_standby` may be called beside them.

    Attributes:
        bundle: What it runs.
        first: Tier that was admitted at the start: the best one that this machine can run.
        reports: What was found about every tier, in the order they were asked for.
        guards: The guards.
        num_backend_errors: How often the backend raised.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        tiers: Sequence[str],
        threads: int = 1,
        guards: GuardConfig | None = None,
        terms: Terms | None = None,
    ) -> None:
        """Admit the first tier whose golden vectors pass here.

        Args:
            bundle: What to run.
            tiers: Tiers to try, best first.
            threads: Threads inside one run.
            guards: Which guards run; default: all.
            terms: Where engines are, and which budgets a tier must hold.

        Raises:
            ModelFileError: No tier passes.
        """
        self.bundle, self._order, self._threads, self._terms = bundle, tuple(tiers), threads, terms
        backend, self.first, self.reports = choose_tier(bundle, self._order, threads, terms)
        self._loaded: dict[str, Backend] = {self.first: backend}
        self._refused: set[str] = set()
        self._tiers_lock = threading.Lock()
        self._now = self._running(self.first)
        self.guards = Guards.of(bundle, guards)
        self._names = [spec.name for spec in bundle.io.outputs]
        self.num_backend_errors = 0
        self._raised = False

    @property
    def tier(self) -> str:
        """The tier that runs."""
        return self._now.tier

    @property
    def backend(self) -> Backend:
        """What runs it."""
        return self._now.backend

    @property
    def running(self) -> Running:
        """What runs now."""
        return self._now

    @property
    def admitted(self) -> tuple[str, ...]:
        """Tiers whose self-test passed here so far, best first. Later ones are tried when they are needed."""
        pairs = zip(self._order, self.reports, strict=True)
        return tuple(tier for tier, report in pairs if report.admitted)

    def run(self, inputs: Arrays, *, missing: Collection[str] = (), refused: bool = False) -> Result:
        """Judge one frame's content, run it, and judge the outputs.

        Args:
            inputs: Inputs whose structure was checked.
            missing: Inputs whose sensor is not there.
            refused: The frame is invalid already: judge its content, do not run it.
        """
        backend, tier, model, provider = self._now
        feeds, findings, scores = self.guards.before(inputs, missing, refused=refused)
        if feeds is None:
            return Result({}, tuple(findings), tier, model, provider, scores)
        try:
            results: Sequence[Array] = backend.run(feeds)
        except Exception as error:  # whatever a backend raises is one bad frame, not the end of perception
            found, innocent = self._explain(error, backend)
            return Result({}, (*findings, found), tier, model, provider, scores, innocent)
        self._raised = False
        outputs: Arrays = {}
        for name, array in zip(self._names, results, strict=True):  # no comprehension: that is a function of its own
            outputs[name] = array[0]
        if not (broken := self.guards.outputs(outputs)):
            return Result(outputs, tuple(findings), tier, model, provider, scores)
        unusable = any(found.code not in WARNINGS for found in broken)
        return Result({} if unusable else outputs, (*findings, *broken), tier, model, provider, scores)

    def self_test(self, sample: int | None = None) -> TierReport:
        """Run golden samples on the tier that runs now and compare; not beside `run`.

        Args:
            sample: Number of one sample, for a test between two frames; default: all.
        """
        numbers = range(len(self.bundle.golden)) if sample is None else [sample % len(self.bundle.golden)]
        backend, tier, _, provider = self._now
        return self_test(self.bundle, tier, backend, provider, numbers)

    def next_tier(self) -> str | None:
        """The first tier after the present one that is admitted, or admits itself now; None: there is none left."""
        later = [tier for tier in self._order[self._order.index(self.tier) + 1:] if tier not in self._refused]
        return next((tier for tier in later if self.admit(tier).admitted), None)

    def faster_tier(self) -> str | None:
        """A loaded tier that is clearly faster here than the present one; None: there is none."""
        now_ms = self._report_of(self.tier).p50_ms
        times = {tier: self._report_of(tier).p50_ms for tier in self._loaded if tier != self.tier}
        fitting = {tier: ms for tier, ms in times.items() if ms and now_ms and ms < CLEARLY_FASTER * now_ms}
        return min(fitting, key=lambda tier: fitting[tier], default=None)

    def admit(self, tier: str, *, again: bool = False) -> TierReport:
        """Load a tier and self-test it, where that has not been done.

        Args:
            tier: Its name.
            again: Load it anew and test it, whatever was found before.
        """
        with self._tiers_lock:
            if tier in self._loaded and not again:
                return self._report_of(tier)
            backend, report = admit_tier(self.bundle, tier, self._threads, self._terms)
            at = self._order.index(tier)
            self.reports = (*self.reports[:at], report, *self.reports[at + 1:])
            if backend is None:
                self._refused.add(tier)
            else:
                self._refused.discard(tier)
                old_backend, self._loaded[tier] = self._loaded.get(tier), backend
                if old_backend is not None and old_backend is not self._now.backend:
                    close(old_backend)
            return report

    def use(self, tier: str) -> None:
        """Run another admitted tier from the next frame on; it is loaded if it is not on standby.

        Raises:
            ModelFileError: It is refused here, and the present one goes on.
        """
        report = self.admit(tier)
        if not report.admitted:
            raise ModelFileError(f"tier {tier} is refused here: {report.reason}", where=self.bundle.artifact.root)
        before = self._now.backend
        self._now, self._raised = self._running(tier), False
        if before not in self._loaded.values():
            close(before)  # it was loaded anew

    def prepare_standby(self) -> str | None:
        """Load the next tier that this machine admits, so that it can take over between two frames; return its name."""
        return self.next_tier()

    def release_standby(self) -> None:
        """Give back the memory of every tier but the one that runs."""
        with self._tiers_lock:
            for tier in [tier for tier in self._loaded if tier != self.tier]:
                close(self._loaded.pop(tier))

    def close(self) -> None:
        """Give all backends' memory back."""
        self.release_standby()
        close(self.backend)

    def _running(self, tier: str) -> Running:
        backend = self._loaded[tier]
        return Running(backend, tier, self._model_of(tier), backend.provider)

    def _model_of(self, tier: str) -> str:
        return self.bundle.model_sha256(tier_named(tier).variant)

    def _report_of(self, tier: str) -> TierReport:
        return self.reports[self._order.index(tier)]

    def _explain(self, error: Exception, backend: Backend) -> tuple[Finding, bool]:
        """Who is to blame for an error: the frame, the backend, or a device that only a new process gets back.

        The second error in a row is held against the golden input. If that runs, the frame is to blame. If it fails
        too, so would every frame: another tier must take over, or where none is left, another process.
        """
        self.num_backend_errors += 1
        text = first_line(error)
        again, self._raised = self._raised, True
        if isinstance(error, DeviceLostError):
            return Finding(Reason.DEVICE_LOST, text), False
        if not again:
            return Finding(Reason.BACKEND_ERROR, text), False
        try:
            backend.run(golden_feeds(self.bundle, 0))
        except Exception:
            lost = self.next_tier() is None
            return Finding(Reason.DEVICE_LOST if lost else Reason.BACKEND_ERROR, text), False
        return Finding(Reason.BACKEND_ERROR, text), True
