"""`Runtime`: a bundle that proved itself on this machine, and answers frames."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from fmdeploy.arrays import Arrays
from fmdeploy.errors import FmdeployError
from fmdeploy.runtime.backends.protocol import Backend
from fmdeploy.runtime.bundle import Bundle, open_bundle
from fmdeploy.runtime.frame import Frame
from fmdeploy.runtime.guards.content import GuardConfig
from fmdeploy.runtime.inference import Inference
from fmdeploy.runtime.publisher import Clock, Publisher
from fmdeploy.runtime.tiers import TIERS, TierReport


class Runtime:
    """A verified bundle with all guards on, in this very process.

    Calls from several threads are served one after the other. Start it after a fork, never before.
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
            tiers: Tiers to try, best first.
            threads: Threads inside one run.
            guards: Which guards run; default: all.
            deadline_ms: Age at which a result is discarded; None: never.
            clock: Monotonic nanoseconds; sensor stamps are on this clock.

        Raises:
            ArtifactError: The bundle is missing or altered.
            ModelFileError: No tier passes.
        """
        self.bundle = open_bundle(bundle)
        self.inference = Inference(self.bundle, tiers=tiers, threads=threads, guards=guards)
        self.publisher = Publisher(self.bundle.digest, deadline_ms=deadline_ms, clock=clock)
        self._lock, self._pid = threading.Lock(), os.getpid()

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
            A frame. Bad *content* (NaN, range, stamps, lateness) makes it invalid, with reasons.

        Raises:
            FrameError: Bad *structure* (type, dtype, shape, layout, names): a mistake in the calling program.
        """
        # Before the lock: a child that was forked while another thread held it would wait for ever.
        if os.getpid() != self._pid:
            raise FmdeployError("the runtime was forked; start it in the process that uses it")
        with self._lock:
            self.inference.guards.structure(inputs, layouts, missing)
            ticket = self.publisher.arrive(stamp_ns, deadline_ms)
            result = self.inference.run(inputs, missing=missing, refused=ticket.refused)
            return self.publisher.publish(ticket, result)

    def close(self) -> None:
        """Give the backend's memory back."""
        self.inference.close()
