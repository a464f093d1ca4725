"""The words of the state machine: states, modes, causes, events, commands, the policy and the status."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000


class Word(str, Enum):
    """A word of the machine; it hashes like its text, which is many times faster than like an Enum."""

    __hash__ = str.__hash__


class State(Word):
    """What the runtime is doing. A valid frame comes out of ACTIVE and of DEGRADED in D1 and D2, of nothing else."""

    UNCONFIGURED = "UNCONFIGURED"  # no bundle, or closed
    LOADING = "LOADING"  # the bundle is verified, the backend is being made
    SELF_TEST = "SELF_TEST"  # the golden input runs
    READY = "READY"  # may be asked to run
    ACTIVE = "ACTIVE"  # fresh results within their deadlines
    DEGRADED = "DEGRADED"  # runs in a mode, for the causes that are held
    SAFE_OUTPUT = "SAFE_OUTPUT"  # latched: nothing is valid until the operator resets
    FAULT = "FAULT"  # the process cannot be trusted: it ends with a non-zero code
    DRAINING = "DRAINING"  # stop was asked for


class Mode(IntEnum):
    """The ladder of degraded modes; a larger one gives less."""

    NONE = 0
    D1 = 1  # reduced rate, or on probation after a restart
    D2 = 2  # a smaller or slower model, fewer sensors, little memory
    D3 = 3  # the last good result with its growing age; never valid
    D4 = 4  # no perception

    @property
    def label(self) -> str:
        """`D1` to `D4`; empty for NONE."""
        return self.name if self else ""


class Cause(Word):
    """Why the runtime is degraded. Several hold at once; each leaves by its own proof, and the worst one rules."""

    LATE = "LATE"  # results miss their deadlines
    BAD_FRAMES = "BAD_FRAMES"  # no frame was good for too long
    NO_INPUT = "NO_INPUT"  # no frame arrives
    SENSOR = "SENSOR"  # a sensor is missing
    HEAT = "HEAT"  # the board throttles
    MEMORY = "MEMORY"  # little memory is left
    BACKEND = "BACKEND"  # the backend raises
    SELF_TEST = "SELF_TEST"  # the running tier gave wrong golden outputs
    FALLBACK = "FALLBACK"  # a later tier runs than the one that was chosen at the start
    WORKER = "WORKER"  # the worker process died
    MONITOR = "MONITOR"  # nobody watches


class EventKind(Word):
    """What may happen."""

    VERIFIED = "VERIFIED"  # the bundle is what its manifest says
    LOADED = "LOADED"  # a backend exists
    SELF_TEST_PASSED = "SELF_TEST_PASSED"
    SELF_TEST_FAILED = "SELF_TEST_FAILED"
    FRAME_GOOD = "FRAME_GOOD"  # a frame whose findings are at most warnings
    FRAME_BAD = "FRAME_BAD"  # a frame that its content or its stamp makes invalid
    FRAME_LATE = "FRAME_LATE"  # after the soft deadline
    FRAME_OVERDUE = "FRAME_OVERDUE"  # after the hard deadline
    NO_INPUT = "NO_INPUT"  # nothing arrived within the input timeout
    HELD_TOO_LONG = "HELD_TOO_LONG"  # the last good result is past the staleness limit
    BACKEND_FAILED = "BACKEND_FAILED"  # the backend raised
    DEVICE_LOST = "DEVICE_LOST"  # it raises on the golden input too, and nothing else can run
    WORKER_LOST = "WORKER_LOST"
    WORKER_STARTED = "WORKER_STARTED"
    MONITOR_LOST = "MONITOR_LOST"
    MONITOR_BACK = "MONITOR_BACK"
    MEMORY_LOW = "MEMORY_LOW"
    MEMORY_OK = "MEMORY_OK"
    THROTTLED = "THROTTLED"
    COOL = "COOL"
    SENSOR_LOST = "SENSOR_LOST"
    SENSOR_BACK = "SENSOR_BACK"
    TIER_CHANGED = "TIER_CHANGED"  # a later tier, admitted by its self-test, took over
    TIER_RESTORED = "TIER_RESTORED"  # the first tier passed its self-test again and took over
    STOP = "STOP"
    DRAINED = "DRAINED"
    RESET = "RESET"  # the operator unlatches


class Command(Word):
    """What the owner of the machine must do."""

    LOAD = "LOAD"  # make the backend, or start the worker that does
    RUN_SELF_TEST = "RUN_SELF_TEST"  # and tell SELF_TEST_PASSED or SELF_TEST_FAILED
    PREPARE_STANDBY = "PREPARE_STANDBY"  # load the next admitted tier
    USE_NEXT_TIER = "USE_NEXT_TIER"  # and tell TIER_CHANGED when it runs
    USE_FASTER_TIER = "USE_FASTER_TIER"  # where one is admitted; tell TIER_CHANGED when it runs
    TRY_BETTER_TIER = "TRY_BETTER_TIER"  # self-test the first tier; tell TIER_RESTORED when it passed and runs
    RELEASE_STANDBY = "RELEASE_STANDBY"  # give memory back
    RESTART_WORKER = "RESTART_WORKER"
    STOP_WORKER = "STOP_WORKER"
    DRAIN = "DRAIN"  # finish or discard, then tell DRAINED
    EXIT = "EXIT"  # end the process: non-zero in FAULT


class Event(NamedTuple):
    """Something that happened, and when on the monotonic clock: the machine has no other clock."""

    kind: EventKind
    at_ns: int
    detail: str = ""


@dataclass(frozen=True)
class Policy:
    """All thresholds.

    Attributes:
        late_in_a_row: Consecutive late results that climb one rung.
        late_of_64: Late results among the last 64 frames that climb one rung.
        hard_factor: A result older than this many deadlines is overdue: one is enough for a rung.
        bad_in_a_row: Consecutive bad frames that may degrade, if they also last `invalid_ms`.
        invalid_ms: How long no frame must be good.
        backend_errors: Consecutive backend errors after which the next tier takes over.
        input_timeout_ms: How long nothing may arrive; None: frames come when they come.
        hold_ms: Staleness limit of the last good result in D3; 0: nothing is held, and D3 is D4.
        good_frames: Consecutive good frames that a recovery needs...
        recover_ms: ...and the time since the last evidence of the cause. Doubles with every relapse, up to 32 times.
        relapse_ms: A cause that comes back so soon after a recovery is a relapse.
        better_tier_ms: How long a later tier runs before the first one is tried again; doubles like `recover_ms`.
        reduced_rate: While results are late or the board throttles, one of so many frames runs.
        sensor_mode: Mode while a sensor is missing.
        max_restarts: Restarts of the worker within `restart_window_ms`; the next loss latches SAFE_OUTPUT.
        restart_window_ms: See `max_restarts`.
        self_test_ms: How often one golden sample runs between two frames; None: never after the start.
        supervised: A supervisor can replace a lost device's process; without one DEVICE_LOST is FAULT.
    """

    late_in_a_row: int = 3
    late_of_64: int = 12
    hard_factor: float = 3.0
    bad_in_a_row: int = 3
    invalid_ms: float = 1000.0
    backend_errors: int = 3
    input_timeout_ms: float | None = None
    hold_ms: float = 500.0
    good_frames: int = 5
    recover_ms: float = 1000.0
    relapse_ms: float = 60_000.0
    better_tier_ms: float = 30_000.0
    reduced_rate: int = 2
    sensor_mode: Mode = Mode.D2
    max_restarts: int = 3
    restart_window_ms: float = 60_000.0
    self_test_ms: float | None = 60_000.0
    supervised: bool = False


# For evaluation: the samples of a dataset are no stream, and bad ones say nothing about the next.
INDEPENDENT = Policy(invalid_ms=math.inf, self_test_ms=None)


class Held(NamedTuple):
    """One cause that holds.

    Attributes:
        cause: Which.
        rung: Mode that it demands.
        since_ns: Last evidence of it: recovery counts from here.
        lasting: It holds until an event ends it, such as COOL ends HEAT; only then good frames count.
        good: Consecutive good frames since the last evidence.
        detail: What was said when it was raised.
    """

    cause: Cause
    rung: Mode
    since_ns: int
    lasting: bool = False
    good: int = 0
    detail: str = ""


class Status(NamedTuple):
    """All that the machine remembers.

    Attributes:
        state: State.
        held: Causes, each at most once.
        late: Consecutive late results.
        late_bits: The last 64 frames, newest in bit 0; a set bit was late.
        failed: Consecutive backend errors.
        bad: Consecutive bad frames.
        bad_since_ns: When the first of them came.
        restarts: When the worker was lost, within the window.
        relapses: Causes that came back too soon after a recovery.
        recovered_ns: When the last cause left.
    """

    state: State = State.UNCONFIGURED
    held: tuple[Held, ...] = ()
    late: int = 0
    late_bits: int = 0
    failed: int = 0
    bad: int = 0
    bad_since_ns: int = 0
    restarts: tuple[int, ...] = ()
    relapses: int = 0
    recovered_ns: int | None = None

    @property
    def mode(self) -> Mode:
        """The worst mode that a cause demands; NONE outside of DEGRADED."""
        if self.state is not State.DEGRADED:
            return Mode.NONE
        return max((held.rung for held in self.held), default=Mode.NONE)

    @property
    def may_be_valid(self) -> bool:
        """Whether a frame without findings against it may be published as valid."""
        return self.state is State.ACTIVE or (self.state is State.DEGRADED and self.mode <= Mode.D2)

    @property
    def takes_frames(self) -> bool:
        """Whether frames are run: also where none is valid, since good frames are the proof that ends a cause."""
        stopped = any(held.cause in NEEDS_NO_FRAMES and held.rung is Mode.D4 for held in self.held)
        return self.state in SERVING and not stopped

    @property
    def reduced_rate(self) -> bool:
        """Whether only one of `Policy.reduced_rate` frames runs."""
        return any(held.cause in (Cause.LATE, Cause.HEAT) for held in self.held)

    def find(self, cause: Cause) -> Held | None:
        """The cause, where it holds."""
        return next((held for held in self.held if held.cause is cause), None)


SERVING = frozenset({State.READY, State.ACTIVE, State.DEGRADED})
NEEDS_NO_FRAMES = frozenset({Cause.WORKER, Cause.MONITOR})
