"""The tables as Markdown: a mermaid picture of the states, the ladder, and every transition (docs/runtime.md)."""

from __future__ import annotations

from collections.abc import Iterable

from fmdeploy.runtime.state.deadlines import Timing, chain, worst
from fmdeploy.runtime.state.kinds import Policy, State
from fmdeploy.runtime.state.ladder import LADDER, Rule
from fmdeploy.runtime.state.table import TABLE, Row

# What an event says in the picture where many lead from one state to another.
MANY = 3


def picture() -> str:
    """Return the states and the transitions between them as a mermaid state diagram."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> UNCONFIGURED"]
    edges: dict[tuple[State, State], list[Row]] = {}
    for row in TABLE:
        if row.then is not row.state:
            edges.setdefault((row.state, row.then), []).append(row)
    for (state, then), rows in edges.items():
        lines.append(f"    {state.value} --> {then.value}: {_label(rows)}")
    lines += ["    state DEGRADED {", "        direction LR"]
    lines += [f"        {one} --> {two}: evidence" for one, two in (("D1", "D2"), ("D2", "D3"), ("D3", "D4"))]
    lines += [f"        {two} --> {one}: proof" for one, two in (("D1", "D2"), ("D2", "D3"), ("D3", "D4"))]
    return "\n".join([*lines, "    }", "    FAULT --> [*]", "```"])


def transitions() -> str:
    """Return every row that changes the state or commands something, as a table."""
    head = ["| state | event | where | then | commands |", "|---|---|---|---|---|"]
    rows = [row for row in TABLE if row.then is not row.state or row.commands]
    return "\n".join(head + [
        f"| {row.state.value} | {row.event.value} | {_where(row.condition)} | {row.then.value} | {_commands(row)} |"
        for row in rows])


def ladder() -> str:
    """Return the rules of the ladder as a table."""
    head = ["| event | where | cause | effect | mode | commands |", "|---|---|---|---|---|---|"]
    return "\n".join(head + [
        f"| {rule.event.value} | {_where(rule.condition)} | {rule.cause.value if rule.cause else 'all'} | "
        f"{rule.effect.value} | {rule.rung.label} | {_commands(rule)} |"
        for rule in LADDER])


def deadlines(timing: Timing, policy: Policy) -> str:
    """Return the deadline chain as a table."""
    head = ["| fault | worst case | FDTI ms | FRTI ms | answer |", "|---|---|--:|--:|---|"]
    links = chain(timing, policy)
    return "\n".join(head + [
        f"| {link.fault} | {link.sum} | {link.fdti_ms:g} | {link.frti_ms:g} | {link.answer} |" for link in links
    ] + [f"| **worst sum** | | **{worst(links):g}** | | |"])


def _label(rows: list[Row]) -> str:
    plain = ("always", "otherwise")
    names = [row.event.value + ("" if row.condition in plain else f" [{row.condition}]") for row in rows]
    return ", ".join(names) if len(names) <= MANY else f"{', '.join(names[:MANY])} and {len(names) - MANY} more"


def _where(condition: str) -> str:
    return "" if condition == "always" else condition


def _commands(row: Row | Rule) -> str:
    commands: Iterable[str] = (command.value for command in row.commands)
    return ", ".join(commands)
