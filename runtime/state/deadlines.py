"""The deadline chain, and how long a fault may go undetected: the sum of the worst cases of our own process.

FDTI and FRTI in the sense of ISO 26262-1:2018 (3.55, 3.59), for our own faults and our own state change only; what time
an item has (FTTI) is for the item's analysis to say. The sums help collect evidence, they certify nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fmdeploy.runtime.state.kinds import Policy


class Link(NamedTuple):
    """One fault of our own process, and the sum of the worst cases until it is detected and answered.

    Attributes:
        fault: What goes wrong.
        sum: The addends, in words.
        fdti_ms: From the fault to the first frame that says so.
        frti_ms: From there to the state or the tier that answers it.
        answer: Which one that is.
    """

    fault: str
    sum: str
    fdti_ms: float
    frti_ms: float
    answer: str


@dataclass(frozen=True)
class Timing:
    """What the sums are made of, in ms.

    Attributes:
        period_ms: Frame period.
        deadline_ms: Soft deadline: a result older than this is discarded.
        run_ms: Worst run of the model, guards included, as `fmdeploy check` measures it.
        hard_deadline_ms: The supervisor kills a worker that has not answered for so long; None: embedded, no bound.
        poll_ms: How often `poll` is called.
        frozen_after: Repetitions that the guards call frozen.
    """

    period_ms: float
    deadline_ms: float
    run_ms: float
    hard_deadline_ms: float | None = None
    poll_ms: float | None = None
    frozen_after: int = 10


def chain(timing: Timing, policy: Policy) -> tuple[Link, ...]:
    """Return the links for one configuration."""
    period, run = timing.period_ms, timing.run_ms
    poll = timing.poll_ms if timing.poll_ms is not None else period
    links = [
        Link("bad content or a wrong stamp", "one run", run, 0.0, "this frame is not valid"),
        Link("no good frame for long", "invalid_ms + a period", policy.invalid_ms + period, 0.0, "D3, then D4"),
        Link("frozen sensor", "frozen_after periods + a run", timing.frozen_after * period + run, 0.0,
             "this frame is not valid"),
        Link("result past its deadline", "one run past the deadline", timing.deadline_ms + run, 0.0,
             "this frame is not valid"),
        Link("results late again and again", "late_in_a_row periods + a run", policy.late_in_a_row * period + run, 0.0,
             "D1"),
        Link("backend raises", "backend_errors periods + a run", policy.backend_errors * period + run, period,
             "next tier, D2"),
        Link("device lost", "two periods + a run + the golden input", 2 * period + 2 * run, 0.0, "FAULT, exit"),
    ]
    if policy.input_timeout_ms is not None:
        links.append(Link("no input", "input_timeout_ms + a poll", policy.input_timeout_ms + poll, 0.0, "D3, then D4"))
    if timing.hard_deadline_ms is not None:
        links.append(Link("run that never returns", "hard_deadline_ms", timing.hard_deadline_ms, period,
                          "worker killed, D4"))
    return tuple(links)


def worst(links: tuple[Link, ...]) -> float:
    """Return the largest sum of detection and reaction, in ms."""
    return max(link.fdti_ms + link.frti_ms for link in links)
