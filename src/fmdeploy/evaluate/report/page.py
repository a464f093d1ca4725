"""The page: every section built from the sources, then one template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmdeploy.evaluate.plots.figure import Picture
from fmdeploy.evaluate.report import words
from fmdeploy.evaluate.report.accuracy import (
    SliceRow,
    channels_section,
    comparisons,
    metric_table,
    overall,
    primary,
    reliability_section,
    slice_table,
    slices_section,
)
from fmdeploy.evaluate.report.alarms import AlarmRow, alarm_rows
from fmdeploy.evaluate.report.latency import Tier, latency_section
from fmdeploy.evaluate.report.limits import limits, proofs
from fmdeploy.evaluate.report.origins import EventRow, OriginRow, event_rows, origin_rows
from fmdeploy.evaluate.report.panels import Example, panels_section
from fmdeploy.evaluate.report.precision import Precision, precision_section
from fmdeploy.evaluate.report.probes import Probes, probes_section
from fmdeploy.evaluate.report.sources import Sources
from fmdeploy.evaluate.report.tables import (
    LineageRow,
    SizeRow,
    SplitRow,
    environment_rows,
    lineage_rows,
    parameters_of,
    size_rows,
    split_rows,
)
from fmdeploy.evaluate.report.tensorrt import TensorRt, tensorrt_section
from fmdeploy.evaluate.report.training import PaceRow, pace_rows, training_section
from fmdeploy.evaluate.report.trouble import Trouble, trouble_section
from fmdeploy.evaluate.report.verdict import Verdict, verdict_of
from fmdeploy.optional import require

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Tile:
    """One headline number."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Page:
    """All that the template prints. A section that is a `str` says why it is missing."""

    title: str
    task: str
    metric: str
    bundle: str
    verdict: Verdict
    notes: tuple[str, ...]
    tiles: tuple[Tile, ...]
    overall: tuple[tuple[str, str, str], ...]
    metric_names: list[str]
    metric_rows: list[tuple[str, list[float]]]
    channels: Picture | str | None
    slices: Picture | str
    slice_names: list[str]
    slice_rows: list[SliceRow]
    reliability: list[Picture] | str
    training: Picture | str
    pace: list[PaceRow]
    probes: Probes | None
    precision: Precision | None
    tensorrt: TensorRt | str
    trouble: Trouble | str
    latency: Picture | str
    tiers: list[Tier]
    alarms: list[AlarmRow]
    examples: tuple[list[str], list[Example]] | str
    legend: str
    lineage: list[LineageRow]
    splits: list[SplitRow]
    origins: list[OriginRow]
    events: list[EventRow]
    sizes: list[SizeRow]
    environment: list[tuple[str, str]]
    proofs: list[str]
    limits: list[str]

    @property
    def not_given(self) -> tuple[str, ...]:
        """Sections that could not be made, each with the reason."""
        sections = {"channels": self.channels, "slices": self.slices, "reliability": self.reliability,
                    "TensorRT": self.tensorrt, "trouble": self.trouble, "training": self.training,
                    "latency": self.latency, "examples": self.examples}
        missing = tuple(f"{name}: {value}" for name, value in sections.items() if isinstance(value, str))
        return (*missing, *(("verdict: no CHECK",) if self.verdict.result == "not given" else ()))


def build_page(sources: Sources, title: str) -> Page:
    """Measure, compare and draw. Nothing here writes or runs a network.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    metric = primary(sources)
    metric_names, metric_rows = metric_table(sources)
    slice_names, slice_rows = slice_table(sources)
    latency, tiers = latency_section(sources)
    return Page(
        title=title,
        task=sources.task.name if sources.task is not None else "–",
        metric=metric.name if metric is not None else "–",
        bundle=sources.bundle.digest if sources.bundle is not None else "",
        verdict=verdict_of(sources),
        notes=tuple(notes(sources)),
        tiles=tuple(tiles(sources)),
        overall=tuple((m.name, words.number(i.value), f"[{words.number(i.low)}, {words.number(i.high)}]")
                      for m, i in overall(sources)),
        metric_names=metric_names,
        metric_rows=metric_rows,
        channels=channels_section(sources),
        slices=slices_section(sources),
        slice_names=slice_names,
        slice_rows=slice_rows,
        reliability=reliability_section(sources),
        training=training_section(sources),
        pace=list(pace_rows(sources)),
        probes=probes_section(sources),
        precision=precision_section(sources),
        tensorrt=tensorrt_section(sources),
        trouble=trouble_section(sources),
        latency=latency,
        tiers=tiers,
        alarms=alarm_rows(sources),
        examples=panels_section(sources),
        legend=sources.task.panel_legend if sources.task else "",
        lineage=lineage_rows(sources),
        splits=split_rows(sources),
        origins=origin_rows(sources),
        events=event_rows(sources),
        sizes=size_rows(sources),
        environment=environment_rows(sources),
        proofs=proofs(sources),
        limits=limits(sources),
    )


def notes(sources: Sources) -> list[str]:
    """What the checks remark beside their gates, such as which tier serves and why."""
    return [str(n) for check in sources.checks if check.has("check.json") for n in check.json("check.json")["notes"]]


def tiles(sources: Sources) -> list[Tile]:
    """The numbers a reader wants first, as far as they are there."""
    found = []
    for comparison in comparisons(sources):
        i = comparison.interval
        if comparison.kind == "retention":
            found.append(Tile("kept of the teacher", words.percent(1 - i.value, 1), words.span(1 - i.high, 1 - i.low)))
        elif comparison.kind == "int8":
            found.append(Tile("lost by INT8", words.percent(i.value), words.span(i.low, i.high)))
        elif comparison.kind == "distillation":
            detail = f"[{words.signed(-i.high, 3)}, {words.signed(-i.low, 3)}]"
            found.append(Tile("gained by distilling", words.signed(-i.value, 3), detail))
    return [*found, *_size_tile(sources), *_speed_tile(sources)]


def _size_tile(sources: Sources) -> list[Tile]:
    pair = [m.artifact for m in (sources.model("teacher"), sources.model("student")) if m is not None]
    sizes = [found for artifact in pair if artifact is not None and (found := parameters_of(artifact))]
    if len(sizes) != 2:
        return []
    teacher, student = sizes
    return [Tile("smaller than the teacher", f"{teacher / student:.1f} ×", f"{words.count(student)} parameters")]


def _speed_tile(sources: Sources) -> list[Tile]:
    for check in sources.checks:
        found = check.json("check.json").get("speedup", {}) if check.has("check.json") else {}
        for tier, gain in found.items():
            interval = f"[{gain['low']:.2f}, {gain['high']:.2f}], paired runs"
            return [Tile(f"{tier} speed against FP32", f"{gain['value']:.2f} ×", interval)]
    return []


def render(page: Page) -> str:
    """The HTML text.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    jinja2: Any = require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )
    # Only text that this package drew itself may pass unescaped: its own SVG, and the style sheet.
    environment.filters.update(svg=lambda picture: jinja2.utils.markupsafe.Markup(picture.svg))
    environment.globals.update(words=words, style=jinja2.utils.markupsafe.Markup((TEMPLATES / "style.css").read_text()))
    html: str = environment.get_template("page.html").render(page=page)
    return html
