"""`Runtime`: a bundle that proved itself on this machine, and answers frames, in this very process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from fmdeploy.arrays import Arrays
from fmdeploy.runtime.backends.protocol import Backend
from fmdeploy.runtime.bundle import Bundle, open_bundle
from fmdeploy.runtime.frame import Frame
from fmdeploy.runtime.guards.content import GuardConfig
from fmdeploy.runtime.guards.sensors import check_rig
from fmdeploy.runtime.health import Health, forked, require_around
from fmdeploy.runtime.inference import Inference
from fmdeploy.runtime.loading import Terms
from fmdeploy.runtime.publisher import Clock, Publisher
from fmdeploy.runtime.state import Command, EventKind, Policy, State
from fmdeploy.runtime.tiers import TIERS, TierReport

NS_PER_MS = 1_000_000


class Runtime:
    """A verified bundle with all guards on, in this very process.

    Calls from several threads are served one after the other. Start it after a fork, never before. Python cannot
    interrupt an inference: what bounds one that hangs is `SupervisedRuntime`, with its worker process.
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
        policy: Policy | None = None,
        standby: bool = False,
        terms: Terms | None = None,
        rig: Mapping[str, str] | None = None,
    ) -> None:
        """Open the bundle, and admit the first tier whose golden vectors pass here.

        Args:
            bundle: Folder of a BUNDLE, or an opened one.
            tiers: Tiers to try, best first.
            threads: Threads inside one run.
            guards: Which guards run; default: all.
            deadline_ms: Age at which a result is discarded; None: never.
            clock: Monotonic nanoseconds; sensor stamps are on this clock.
            policy: Thresholds of the state machine.
            standby: Load the next admitted tier too, in the background and after READY, so that it takes over between
                two frames. It costs that tier's memory. Without it the fallback loads the tier when it is needed.
            terms: Where engines are, and which budgets a tier must hold.
            rig: This vehicle's sensors, name to sha256 of the calibration; None: not compared with the bundle's.

        Raises:
            ArtifactError: The bundle is missing or altered, or was made for another rig.
            ModelFileError: No tier passes.
        """
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._standby, self._closed = standby, False
        self._helper: threading.Thread | None = None
        self.bundle = open_bundle(bundle)
        if rig is not None:
            check_rig(self.bundle.io, rig)
        self.publisher = Publisher(self.bundle.digest, deadline_ms=deadline_ms, clock=clock, policy=policy)
        self.publisher.tell(EventKind.VERIFIED)
        self.inference = Inference(self.bundle, tiers=tiers, threads=threads, guards=guards, terms=terms)
        self._say_what_runs()
        self.publisher.tell(EventKind.LOADED)
        self._tested_ns, self._sample = self.publisher.clock(), 0
        self._do(self.publisher.tell(EventKind.SELF_TEST_PASSED))  # choosing the tier was the test

    @property
    def tier(self) -> str:
        """The tier that serves now."""
        return self.inference.tier

    @property
    def backend(self) -> Backend:
        """What runs it."""
        return self.inference.backend

    @property
    def reports(self) -> tuple[TierReport, ...]:
        """What was found about every tier, in the order they were asked for."""
        return self.inference.reports

    @property
    def state(self) -> State:
        """State of the runtime."""
        return self.publisher.state

    def infer(
        self,
        inputs: Arrays,
        *,
        stamp_ns: int | None = None,
        deadline_ms: float | None = None,
        layouts: Mapping[str, str] | None = None,
        missing: Collection[str] = (),
    ) -> Frame:
        """Judge one frame, run it, and judge the result.

        Args:
            inputs: Input name to array, exactly as in the bundle's io.json, without batch axis. Arrays that own
                their memory are used in place: do not write to them until this returns.
            stamp_ns: When the sensors saw it, on the runtime's clock; default: now.
            deadline_ms: Overrides the runtime's deadline for this frame.
            layouts: Input name to layout; needed only where the shape does not tell the axes apart.
            missing: Inputs whose sensor is not there: they are left out of `inputs`. Without a mode that the bundle
                declares for it, the frame is not valid; nothing is filled with zeros in silence.

        Returns:
            A frame. Bad *content* (NaN, range, stamps, lateness) makes it invalid, with reasons. The arrays of a valid
            frame are read-only: they may be shown again, with their age, in mode D3.

        Raises:
            FrameError: Bad *structure* (type, dtype, shape, layout, names): a mistake in the calling program.
            FmdeployError: The process was forked after the runtime had started.
        """
        # Before the lock: a child that was forked while another thread held it would wait for ever.
        if os.getpid() != self._pid:
            raise forked()
        with self._lock:
            self.inference.guards.structure(inputs, layouts, missing)
            ticket = self.publisher.arrive(stamp_ns, deadline_ms)
            result = self.inference.run(inputs, missing=missing, refused=ticket.refused)
            frame = self.publisher.publish(ticket, result)
            if commands := self.publisher.take_commands():
                self._do(commands)
            return frame

    def poll(self) -> Frame | None:
        """Look after the runtime between two frames; to be called about once a frame period.

        It runs one golden sample now and then (`Policy.self_test_ms`), where no frame is being inferred.

        Returns:
            An invalid frame with NO_INPUT where nothing arrived within the policy's input timeout; else None.
        """
        if os.getpid() != self._pid:
            raise forked()
        frame = self.publisher.poll()
        if self._lock.acquire(blocking=False):  # a frame in flight comes first
            try:
                self._test_when_due()
                self._do(self.publisher.take_commands())
            finally:
                self._lock.release()
        return frame

    def health(self) -> Health:
        """Say how the runtime is. `live` False means: end this process with a non-zero exit code."""
        if os.getpid() != self._pid:
            raise forked()
        return self.publisher.health()

    def note(self, kind: EventKind, detail: str = "") -> None:
        """Say what was seen of the machine: heat or memory. From any thread, also while a frame runs.

        Raises:
            FmdeployError: It is none of `health.AROUND`.
        """
        require_around(kind)
        if commands := self.publisher.tell(kind, detail):
            with self._lock:
                self._do(commands)

    def reset(self) -> None:
        """The operator unlatches SAFE_OUTPUT: the tier is loaded anew and tested, and serves again if it passes."""
        if os.getpid() != self._pid:
            raise forked()
        with self._lock:
            self._do(self.publisher.tell(EventKind.RESET))

    def close(self) -> None:
        """Finish the frame in flight and give the memory back. A second call does nothing."""
        if os.getpid() != self._pid:
            return  # what was forked belongs to the parent
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self.publisher.tell(EventKind.STOP)
        self.wait()
        with self._lock:
            self.inference.close()
            self.publisher.tell(EventKind.DRAINED)

    def wait(self) -> None:
        """Wait for what runs in the background: a tier that is being loaded or tested."""
        if (helper := self._helper) is not None:
            helper.join()

    def __enter__(self) -> Runtime:
        """Return the runtime."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _say_what_runs(self) -> None:
        _, tier, model, provider = self.inference.running
        self.publisher.runs(model=model, tier=tier, provider=provider)

    def _do(self, commands: tuple[Command, ...]) -> None:
        """Do what the state machine asks; what it learns may give it more to ask."""
        waiting = list(commands)
        while waiting:
            if (action := self._actions().get(waiting.pop(0))) is not None:
                waiting += action()

    def _actions(self) -> dict[Command, Callable[[], tuple[Command, ...]]]:
        return {
            Command.LOAD: self._load_again,
            Command.RUN_SELF_TEST: lambda: self._self_test(None),
            Command.PREPARE_STANDBY: self._prepare_standby,
            Command.RELEASE_STANDBY: self._release_standby,
            Command.USE_NEXT_TIER: lambda: self._use(self.inference.next_tier()),
            Command.USE_FASTER_TIER: lambda: self._use(self.inference.faster_tier()),
            Command.TRY_BETTER_TIER: lambda: self._in_background(self._try_first_tier),
        }

    def _load_again(self) -> tuple[Command, ...]:
        report = self.inference.admit(self.inference.tier, again=True)
        if not report.admitted:
            self.publisher.tell(EventKind.LOADED)
            return self.publisher.tell(EventKind.SELF_TEST_FAILED, report.reason)
        self.inference.use(self.inference.tier)
        return self.publisher.tell(EventKind.LOADED)

    def _self_test(self, sample: int | None) -> tuple[Command, ...]:
        report = self.inference.self_test(sample)
        self._tested_ns = self.publisher.clock()
        if report.admitted:
            return self.publisher.tell(EventKind.SELF_TEST_PASSED)
        return self.publisher.tell(EventKind.SELF_TEST_FAILED, report.reason)

    def _test_when_due(self) -> None:
        every_ms = self.publisher.policy.self_test_ms
        if every_ms is None or not self.publisher.status.takes_frames:
            return
        if self.publisher.clock() - self._tested_ns >= every_ms * NS_PER_MS:
            self._sample += 1
            self._do(self._self_test(self._sample))

    def _use(self, tier: str | None) -> tuple[Command, ...]:
        before = self.inference.tier
        if tier is None:
            return ()
        self.inference.use(tier)
        self._say_what_runs()
        return self.publisher.tell(EventKind.TIER_CHANGED, f"{tier} took over from {before}")

    def _prepare_standby(self) -> tuple[Command, ...]:
        return self._in_background(self.inference.prepare_standby) if self._standby else ()

    def _release_standby(self) -> tuple[Command, ...]:
        self.inference.release_standby()
        return ()

    def _try_first_tier(self) -> None:
        first = self.inference.first
        if not self.inference.admit(first, again=True).admitted:
            return  # the machine asks again, later
        with self._lock:
            if self.publisher.status.takes_frames:
                self.inference.use(first)
                self._say_what_runs()
                self._do(self.publisher.tell(EventKind.TIER_RESTORED))

    def _in_background(self, work: Callable[[], object]) -> tuple[Command, ...]:
        if self._helper is None or not self._helper.is_alive():
            # Not a daemon: the interpreter waits for it instead of pulling onnxruntime away under it.
            self._helper = threading.Thread(target=work, name="fmdeploy-standby")
            self._helper.start()
        return ()
