"""`ServiceRuntime`: the embedded runtime as a service, which tells systemd what the supervised one tells by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fmdeploy.arrays import Arrays
from fmdeploy.runtime.bundle import Bundle
from fmdeploy.runtime.frame import Frame
from fmdeploy.runtime.session import Runtime
from fmdeploy.runtime.state import Policy, State
from fmdeploy.runtime.supervisor.notify import Notifier

TESTS_A_WATCHDOG_INTERVAL = 3
NS_PER_MS = 1_000_000


class ServiceRuntime(Runtime):
    """A runtime whose finished frames and golden samples kick the watchdog: a run that hangs stops the kicks.

    Attributes:
        notifier: Speaks to the service manager, if there is one.
    """

    def __init__(self, bundle: Bundle, **options: Any) -> None:
        """Start it with the options of `Runtime`, and with golden samples as often as the watchdog demands."""
        self.notifier, policy = Notifier(), Policy()
        if self.notifier.interval_ns and policy.self_test_ms is not None:
            every_ms = self.notifier.interval_ns / NS_PER_MS / TESTS_A_WATCHDOG_INTERVAL
            policy = replace(policy, self_test_ms=min(policy.self_test_ms, every_ms))
        try:
            super().__init__(bundle, policy=policy, **options)
        except BaseException:
            self.notifier.close()
            raise
        self.notifier.ready(f"{self.bundle.digest[:12]} on {self.tier}")

    def infer(self, inputs: Arrays, **options: Any) -> Frame:
        """Run a frame; see `Runtime.infer`."""
        frame = super().infer(inputs, **options)
        self.notifier.progress()
        return frame

    def poll(self) -> Frame | None:
        """Look after the runtime between two frames; a golden sample that ran, and a latch, count as progress."""
        before = self._tested_ns
        frame = super().poll()
        # A latch is meant to last until the operator comes; a restart by systemd would open it.
        if self._tested_ns != before or self.state is State.SAFE_OUTPUT:
            self.notifier.progress()
        return frame

    def close(self) -> None:
        """Tell that the service ends, and close."""
        self.notifier.stopping()
        super().close()
        self.notifier.close()
