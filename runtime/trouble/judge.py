"""One fault over all streams: what was published as valid, and what the network would have said without a runtime.

Time is simulated: the clock moves by the frames' own spacing, and inference takes none of it. What is judged is what
the guards, the stamps and the state machine make of a fault, not how fast this machine is.

Legend: N judged samples, K statistics of the metric.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fmdeploy.arrays import Array, Arrays
from fmdeploy.iospec import IOSpec
from fmdeploy.runtime.frame import Frame
from fmdeploy.runtime.session import Runtime
from fmdeploy.runtime.state import Policy
from fmdeploy.runtime.trouble.faults import ONSET, Delivered, Fault
from fmdeploy.runtime.trouble.streams import Frames, Stream
from fmdeploy.task import Metric

# Between two sequences: longer than any recovery or relapse, so that each begins with a healthy runtime.
PAUSE_NS = 10**13
POLICY = Policy(good_frames=ONSET, self_test_ms=None)  # the healthy frames before the fault are all there are
NS = 1e9


class StreamClock:
    """The runtime's clock: nanoseconds that move only when told."""

    def __init__(self) -> None:
        self.now = 10**12

    def __call__(self) -> int:
        """The time now."""
        return self.now


@dataclass(frozen=True)
class Judged:
    """One fault, judged.

    Attributes:
        valid: Whether the runtime published the frame as valid (N).
        reasons: How many frames carried each reason code.
        stats: Metric name to float64 (N, K): of what the network gives when it is run whatever the guards say.
    """

    valid: npt.NDArray[np.bool_]
    reasons: Mapping[str, int]
    stats: dict[str, Array]


class Judge:
    """A runtime on a simulated clock."""

    def __init__(
        self, runtime: Runtime, clock: StreamClock, metrics: Sequence[Metric], *, hz: float, seed: int
    ) -> None:
        """Judge with this runtime.

        Args:
            runtime: Started with `clock` and `POLICY`.
            clock: The time it sees.
            metrics: What is measured.
            hz: Frames a second of the recordings.
            seed: Of the faults' random numbers.
        """
        self.runtime, self.clock, self.metrics = runtime, clock, metrics
        self._step_ns, self._seed = NS / hz, seed

    def judge(self, fault: Fault, streams: Iterable[tuple[Stream, Frames]]) -> Judged:
        """Send every stream through the runtime, with the fault from `ONSET` on; judge the frames from there."""
        valid: list[bool] = []
        reasons: Counter[str] = Counter()
        rows: dict[str, list[Array]] = {metric.name: [] for metric in self.metrics}
        for stream, frames in streams:
            outputs = []
            for frame, raw in self._play(fault, stream, frames):
                valid.append(frame.valid)
                reasons.update({reason.value for reason in frame.reasons})
                outputs.append(raw)
            stacked = {name: np.stack([raw[name] for raw in outputs]) for name in outputs[0]}
            targets = {name: array[ONSET:] for name, array in frames.targets.items()}
            for metric in self.metrics:
                rows[metric.name].append(metric.statistics(stacked, targets))
        return Judged(np.asarray(valid), dict(reasons), {name: np.concatenate(parts) for name, parts in rows.items()})

    def _play(self, fault: Fault, stream: Stream, frames: Frames) -> list[tuple[Frame, Arrays]]:
        """The judged frames of one sequence, each with what the network says by itself."""
        self.clock.now += PAUSE_NS
        times = ((stream.times - stream.times[0]) * self._step_ns).astype(np.int64) + self.clock.now
        found = []
        for k, now in enumerate(times.tolist()):
            self.clock.now = now
            if k < ONSET:
                self.runtime.infer(frames.clean(k), stamp_ns=now)
                continue
            given = fault.deliver(k, frames.clean, self._rng(fault, int(stream.rows[k])))
            stamp = now if given.restamped else int(times[given.source])
            raw = self._unguarded(given)
            found.append((self.runtime.infer(given.inputs, stamp_ns=stamp, missing=given.missing), raw))
        return found

    def _unguarded(self, given: Delivered) -> Arrays:
        """What the network gives when nobody looks: missing sensors are zeros."""
        io: IOSpec = self.runtime.bundle.io
        absent = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in io.inputs if spec.name in given.missing}
        feeds = {spec.name: np.ascontiguousarray({**given.inputs, **absent}[spec.name][None]) for spec in io.inputs}
        results = self.runtime.backend.run(feeds)
        return {spec.name: np.array(array[0]) for spec, array in zip(io.outputs, results, strict=True)}

    def _rng(self, fault: Fault, row: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, zlib.crc32(fault.key.encode()), row])
