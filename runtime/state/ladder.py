"""The ladder: which event is evidence for or against which cause of degradation, as a table.

Causes compose: each is held by itself, with the mode it demands and with its own proof of recovery; the worst mode
rules, and the actions (reduced rate, later tier) are those of all causes together. So a throttled board with a lost
camera is D2, and D1 again when the camera has proved itself while the board is still hot.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from fmdeploy.runtime.state.kinds import SERVING, Cause, Command, EventKind, Mode, State

FRAMES = SERVING
RUNNING = SERVING | {State.LOADING, State.SELF_TEST}
ALIVE = frozenset(State) - {State.FAULT}


class Effect(str, Enum):
    """What evidence does to a cause."""

    RAISE = "raise"  # hold it at the rung; never lowers one that is higher
    CLIMB = "climb"  # hold it at the rung, or one rung above where it is
    LAST = "last"  # hold it at the rung until an event ends it
    END = "end"  # the condition is over: from now on good frames and time count
    LOWER = "lower"  # proven: down to the rung, then good frames and time
    CLEAR = "clear"  # proven: gone
    EXPIRE = "expire"  # every cause at D3 goes to D4
    FORGET = "forget"  # the operator: drop all causes but those whose condition still lasts


class Rule(NamedTuple):
    """One line of the ladder; `condition` is the name of a function in `conditions.py`."""

    event: EventKind
    condition: str
    cause: Cause | None
    effect: Effect
    rung: Mode = Mode.NONE
    commands: tuple[Command, ...] = ()
    states: frozenset[State] = ALIVE


E, C, F = EventKind, Cause, Effect

LADDER: tuple[Rule, ...] = (
    # Frames
    Rule(E.FRAME_LATE, "late too often", C.LATE, F.CLIMB, Mode.D1, (), FRAMES),
    Rule(E.FRAME_OVERDUE, "always", C.LATE, F.CLIMB, Mode.D1, (), FRAMES),
    Rule(E.FRAME_BAD, "bad for too long", C.BAD_FRAMES, F.RAISE, Mode.D3, (), FRAMES),
    Rule(E.NO_INPUT, "always", C.NO_INPUT, F.RAISE, Mode.D3, (), FRAMES),
    Rule(E.HELD_TOO_LONG, "always", None, F.EXPIRE, Mode.D4, (), FRAMES),
    # The model that runs
    Rule(E.BACKEND_FAILED, "failed too often", C.BACKEND, F.RAISE, Mode.D4, (Command.USE_NEXT_TIER,), FRAMES),
    Rule(E.SELF_TEST_FAILED, "always", C.SELF_TEST, F.RAISE, Mode.D4, (Command.USE_NEXT_TIER,), FRAMES),
    Rule(E.SELF_TEST_PASSED, "always", C.SELF_TEST, F.LOWER, Mode.D1, (), FRAMES),
    Rule(E.TIER_CHANGED, "always", C.BACKEND, F.CLEAR),
    Rule(E.TIER_CHANGED, "always", C.SELF_TEST, F.CLEAR),
    Rule(E.TIER_CHANGED, "always", C.FALLBACK, F.LAST, Mode.D2),
    Rule(E.TIER_RESTORED, "always", C.FALLBACK, F.CLEAR),
    # The process
    Rule(E.WORKER_LOST, "always", C.WORKER, F.LAST, Mode.D4, (), RUNNING),
    Rule(E.DEVICE_LOST, "supervised", C.WORKER, F.LAST, Mode.D4, (), RUNNING),
    Rule(E.SELF_TEST_PASSED, "always", C.WORKER, F.LOWER, Mode.D1),
    Rule(E.MONITOR_LOST, "always", C.MONITOR, F.LAST, Mode.D4),
    Rule(E.MONITOR_BACK, "always", C.MONITOR, F.LOWER, Mode.D1),
    # The machine around it
    Rule(E.MEMORY_LOW, "always", C.MEMORY, F.LAST, Mode.D2, (Command.RELEASE_STANDBY,)),
    Rule(E.MEMORY_OK, "always", C.MEMORY, F.END),
    Rule(E.THROTTLED, "always", C.HEAT, F.LAST, Mode.D1),
    Rule(E.COOL, "always", C.HEAT, F.END),
    Rule(E.SENSOR_LOST, "always", C.SENSOR, F.LAST, Mode.D2),  # the policy's `sensor_mode`
    Rule(E.SENSOR_BACK, "always", C.SENSOR, F.END),
    # The operator
    Rule(E.RESET, "latched", None, F.FORGET),
    Rule(E.DRAINED, "draining", None, F.FORGET),
)
