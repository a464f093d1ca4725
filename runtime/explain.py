"""What a status of the state machine adds to a frame's findings, and to what health says."""

from __future__ import annotations

from fmdeploy.runtime.frame import Finding, Reason
from fmdeploy.runtime.state import Cause, Mode, Policy, State, Status

REASON_OF_CAUSE: dict[Cause, Reason] = {
    Cause.LATE: Reason.LATE,
    Cause.BAD_FRAMES: Reason.NOT_READY,
    Cause.NO_INPUT: Reason.NO_INPUT,
    Cause.SENSOR: Reason.SENSOR_MODE,
    Cause.HEAT: Reason.THROTTLED,
    Cause.MEMORY: Reason.MEMORY_FLOOR,
    Cause.BACKEND: Reason.BACKEND_ERROR,
    Cause.SELF_TEST: Reason.NOT_READY,
    Cause.FALLBACK: Reason.FALLBACK,
    Cause.WORKER: Reason.WORKER_LOST,
    Cause.MONITOR: Reason.UNMONITORED,
}
TEXT_OF_CAUSE: dict[Cause, str] = {
    Cause.LATE: "results missed their deadlines",
    Cause.BAD_FRAMES: "no frame was good for too long",
    Cause.NO_INPUT: "no frame arrived",
    Cause.SENSOR: "a sensor is missing",
    Cause.HEAT: "the board throttles",
    Cause.MEMORY: "little memory is left",
    Cause.BACKEND: "the backend raised again and again",
    Cause.SELF_TEST: "the golden input gave wrong outputs",
    Cause.FALLBACK: "a later tier runs",
    Cause.WORKER: "the worker process was lost",
    Cause.MONITOR: "nobody watches this process",
}
REASON_OF_STATE: dict[State, tuple[Reason, str]] = {
    State.UNCONFIGURED: (Reason.NOT_READY, "no bundle is loaded"),
    State.LOADING: (Reason.NOT_READY, "the backend is being made"),
    State.SELF_TEST: (Reason.NOT_READY, "the self-test has not passed yet"),
    State.SAFE_OUTPUT: (Reason.LATCHED, "latched; the operator must reset it"),
    State.FAULT: (Reason.DEVICE_LOST, "this process cannot be trusted any more; start a new one"),
    State.DRAINING: (Reason.NOT_READY, "stopping"),
}
# They go with valid frames too, as warnings.
WARNING_CAUSES = (Cause.HEAT, Cause.MEMORY, Cause.FALLBACK)


def objections(status: Status, policy: Policy) -> tuple[Finding, ...]:
    """Why no frame may be valid now, whatever its content; empty where one may."""
    if status.may_be_valid or status.state is State.READY:
        return ()
    if status.state in REASON_OF_STATE:
        return (Finding(*REASON_OF_STATE[status.state]),)
    return tuple(
        Finding(REASON_OF_CAUSE[held.cause], f"{held.rung.label}: {held.detail or TEXT_OF_CAUSE[held.cause]}; "
                f"{held.good} of {policy.good_frames} good frames since")
        for held in status.held if held.rung >= Mode.D3
    )


def warnings(status: Status) -> tuple[Finding, ...]:
    """What is worth knowing of the machine with every frame, valid or not."""
    return tuple(Finding(REASON_OF_CAUSE[held.cause], held.detail or TEXT_OF_CAUSE[held.cause])
                 for held in status.held if held.cause in WARNING_CAUSES)


def health_reasons(status: Status) -> tuple[str, ...]:
    """Everything that speaks against full service, one line each, worst first."""
    state = REASON_OF_STATE.get(status.state)
    lines = [f"{state[0].value}: {state[1]}"] if state else []
    for held in sorted(status.held, key=lambda held: -held.rung):
        lines.append(f"{REASON_OF_CAUSE[held.cause].value}: {held.detail or TEXT_OF_CAUSE[held.cause]}")
    return tuple(lines)
