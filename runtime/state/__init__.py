"""The state machine of the runtime: two tables and a pure function (docs/runtime.md shows them as a picture)."""

from fmdeploy.runtime.state.kinds import (
    INDEPENDENT,
    Cause,
    Command,
    Event,
    EventKind,
    Held,
    Mode,
    Policy,
    State,
    Status,
)
from fmdeploy.runtime.state.machine import is_calm, step

__all__ = [
    "INDEPENDENT", "Cause", "Command", "Event", "EventKind", "Held", "Mode", "Policy", "State", "Status", "is_calm",
    "step",
]
