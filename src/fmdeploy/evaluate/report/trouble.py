"""Section on trouble: what a runtime publishes when sensors fail, and what the network would have said by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fmdeploy.evaluate.plots.figure import Picture
from fmdeploy.evaluate.plots.trouble import Bar, plot_trouble
from fmdeploy.evaluate.report.sources import Sources
from fmdeploy.evaluate.report.words import number, percent, span
from fmdeploy.manifest import Kind


@dataclass(frozen=True)
class TroubleRow:
    """One fault, as text."""

    name: str
    frames: str
    valid: str
    reasons: str
    value_valid: str
    drop_valid: str
    interval: str
    unguarded: str


@dataclass(frozen=True)
class Trouble:
    """The section."""

    picture: Picture
    metric: str
    tier: str
    about: str
    rows: tuple[TroubleRow, ...]


def trouble_section(sources: Sources) -> Trouble | str:
    """What an EVALUATION found; why the section is missing where none was given."""
    made = next((a for a in sources.artifacts if a.kind is Kind.EVALUATION), None)
    if made is None:
        return "no EVALUATION; run fmdeploy evaluate on the bundle and name its folder"
    found = made.json("trouble.json")
    bars = [Bar(_name(row), row["valid"], row["value_valid"], row["value_unguarded"]) for row in found["rows"]]
    about = (f"Tier {found['tier']}, streams of {found['hz']:g} frames a second, deadline {found['deadline_ms']:g} ms. "
             "Drop: against the clean frames at the same places, 95 % interval over recordings")
    return Trouble(plot_trouble(found["metric"], bars), found["metric"], found["tier"], about,
                   tuple(_row(row) for row in found["rows"]))


def _name(row: dict[str, Any]) -> str:
    return f"{row['fault']} {row['level']}".strip()


def _row(row: dict[str, Any]) -> TroubleRow:
    largest = sorted(row["reasons"].items(), key=lambda item: -item[1])
    said = ", ".join(f"{code} {percent(share, 1)}" for code, share in largest)
    low, high = row["interval"] or (None, None)
    return TroubleRow(_name(row), str(row["frames"]), percent(row["valid"], 1), said or "–", number(row["value_valid"]),
                      percent(row["drop_valid"], 1), span(low, high) if low is not None and high is not None else "–",
                      number(row["value_unguarded"]))
