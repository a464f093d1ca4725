"""`Runtime`: a bundle that proved itself on this machine, and answers frames."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fmdeploy.arrays import Array, Arrays
from fmdeploy.errors import FmdeployError
from fmdeploy.runtime.bundle import Bundle, open_bundle
from fmdeploy.runtime.frame import WARNINGS, Finding, Frame, Reason
from fmdeploy.runtime.guards import GuardConfig, Guards
from fmdeploy.runtime.tiers import TIERS, choose_tier

Clock = Callable[[], int]
NS_PER_MS = 1_000_000


class Runtime:
    """A verified bundle on ONNX Runtime, with all guards on.

    Calls from several threads are served one after the other. Start it after a fork, never before.

    Attributes:
        bundle: What it runs.
        backend: What runs it.
        tier: Variant that was admitted.
        reports: What was found about every tier, in the order they were asked for.
    """

    def __init__(
        self,
        bundle: Path | str | Bundle,
        *,
        tiers: Sequence[str] = TIERS,
        threads: int = 1,
        guards: GuardConfig | None = None,
        deadline_ms: float | None = None,
        clock: Clock = time.monotonic_ns,
    ) -> None:
        """Open the bundle, and admit the first tier whose golden vectors pass here.

        Args:
            bundle: Folder of a BUNDLE, or an opened one.
            tiers: Variants to try, best first.
            threads: Threads inside one run.
            guards: Which guards run; default: all.
            deadline_ms: Age at which a result is discarded; None: never.
            clock: Monotonic nanoseconds; sensor stamps are on this clock.

        Raises:
            ArtifactError: The bundle is missing or altered.
            ModelFileError: No tier passes.
        """
        self.bundle = open_bundle(bundle)
        self.backend, self.tier, self.reports = choose_tier(self.bundle, tiers, threads)
        self._guards = Guards(self.bundle.io, self.bundle.statistics, guards or GuardConfig())
        self._model, self._digest = self.bundle.model_sha256(self.tier), self.bundle.digest
        self._names = [spec.name for spec in self.bundle.io.outputs]
        self._deadline_ms, self._clock = deadline_ms, clock
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._seq, self._last_stamp = 0, -1
        self.num_backend_errors = 0

    def infer(
        self,
        inputs: Arrays,
        *,
        stamp_ns: int | None = None,
        deadline_ms: float | None = None,
        layouts: Mapping[str, str] | None = None,
    ) -> Frame:
        """Judge one frame, run it, and judge the result.

        Args:
            inputs: Input name to array, exactly as in the bundle's io.json, without batch axis. Arrays that own
                their memory are used in place: do not write to them until this returns.
            stamp_ns: When the sensors saw it, on the runtime's clock; default: now.
            deadline_ms: Overrides the runtime's deadline for this frame.
            layouts: Input name to layout; needed only where the shape does not tell the axes apart.

        Returns:
            A frame. Bad *content* (NaN, range, stamps, lateness) makes it invalid, with reasons.

        Raises:
            FrameError: Bad *structure* (type, dtype, shape, layout, names): a mistake in the calling program.
        """
        # Before the lock: a child that was forked while another thread held it would wait for ever.
        if os.getpid() != self._pid:
            raise FmdeployError("the runtime was forked; start it in the process that uses it")
        with self._lock:
            start = self._clock()
            self._guards.structure(inputs, layouts)
            seq, self._seq = self._seq, self._seq + 1
            deadline = self._deadline_ms if deadline_ms is None else deadline_ms
            stamp = start if stamp_ns is None else stamp_ns
            findings = [] if stamp_ns is None else self._judge_stamp(stamp, start, deadline)
            outputs = self._judge_and_run(inputs, findings)
            end = self._clock()
            if deadline is not None and end - stamp > deadline * NS_PER_MS and outputs:
                text = f"{(end - stamp) / NS_PER_MS:.1f} ms old, deadline {deadline:g} ms"
                findings.append(Finding(Reason.LATE, text))
                outputs = {}
            valid = not findings or all(finding.code in WARNINGS for finding in findings)
            return Frame(seq, stamp, end, deadline, (end - start) / NS_PER_MS, self._digest, self._model, self.tier,
                         self.backend.provider, valid, tuple(findings), outputs)

    def _judge_and_run(self, inputs: Arrays, findings: list[Finding]) -> Arrays:
        """Append what is found to `findings`; return no outputs where the model must not see the frame."""
        refused = bool(findings)  # a stamp that is refused
        values = self._guards.own(inputs)
        fatal = self._guards.fatal(values)
        if fatal:
            findings += fatal
            return {}
        findings += self._guards.doubts(values)
        return {} if refused else self._run(self._guards.feeds(values), findings)

    def _judge_stamp(self, stamp: int, now: int, deadline: float | None) -> list[Finding]:
        last = self._last_stamp
        if stamp > now:
            return [Finding(Reason.BAD_STAMP, f"{(stamp - now) / NS_PER_MS:.1f} ms in the future")]
        if stamp <= last:
            word = "repeats" if stamp == last else "is older than"
            return [Finding(Reason.BAD_STAMP, f"the stamp {word} the previous one")]
        self._last_stamp = stamp
        if deadline is not None and now - stamp > deadline * NS_PER_MS:
            text = f"{(now - stamp) / NS_PER_MS:.1f} ms old on arrival, deadline {deadline:g} ms"
            return [Finding(Reason.STALE, text)]
        return []

    def _run(self, feeds: Arrays, findings: list[Finding]) -> Arrays:
        try:
            results: Sequence[Array] = self.backend.run(feeds)
        except Exception as error:  # whatever a backend raises is one bad frame, not the end of perception
            self.num_backend_errors += 1
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            findings.append(Finding(Reason.BACKEND_ERROR, text))
            return {}
        outputs = {name: array[0] for name, array in zip(self._names, results, strict=True)}
        broken = self._guards.outputs(outputs)
        findings += broken
        return {} if broken else outputs
