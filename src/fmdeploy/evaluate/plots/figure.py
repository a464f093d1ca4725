"""The one place that knows matplotlib: figures without pyplot, and SVG that is deterministic and follows the page.

Colours are *tokens*: rare hex values that become CSS variables in the SVG text, so that one figure is readable on light
and on dark paper and in print. Text stays text (small files, searchable, read aloud); ids are prefixed with the
figure's name, because all figures share one HTML document.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fmdeploy.optional import require

INK, MUTED, GRID = "#010101", "#010102", "#010103"
TOKENS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    "#010111": "var(--teacher)",
    "#010112": "var(--student)",
    "#010113": "var(--int8)",
    "#010114": "var(--scratch)",
    "#010115": "var(--baseline)",
    "#010116": "var(--other)",
    "#010117": "var(--fail)",
}
STYLE = {
    "font.size": 10.0,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # names are the user's: a dollar sign in one is no formula
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class Look:
    """How one model is drawn everywhere: a colour token, a marker and a line style, so that colour is never alone."""

    color: str
    marker: str
    dash: str


LOOKS = {
    "teacher": Look("#010111", "s", "-"),
    "student": Look("#010112", "o", "-"),
    "int8": Look("#010113", "D", "--"),
    "scratch": Look("#010114", "^", "-"),
    "baseline": Look("#010115", "x", ":"),
    "baseline-2": Look("#010115", "+", "--"),
    "other": Look("#010116", "v", "-."),
}


@dataclass(frozen=True)
class Picture:
    """One finished figure: inline SVG, what it shows for those who cannot see it, and what to know about it."""

    svg: str
    alt: str
    caption: str = ""


@contextmanager
def canvas(name: str, width: float, height: float, **grid: Any) -> Iterator[tuple[Any, Any]]:
    """Yield `(figure, axes)`; inside, matplotlib uses our style.

    Args:
        name: Prefix of all ids, unique on the page.
        width: Inches; the page scales the figure to its column.
        height: Inches.
        grid: Passed to `Figure.subplots`, such as `nrows`, `ncols`, `sharey`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib")
    figures = require("matplotlib.figure")
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        # Not through pyplot: that keeps figures alive in a global list and picks a window system.
        figure = figures.Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots(**grid)
        for each in axes.flat if hasattr(axes, "flat") else [axes]:
            each.patch.set_alpha(0)
        yield figure, axes


def to_svg(figure: Any, name: str) -> str:
    """The figure as an `<svg>` element for inlining; equal figures give equal text. Call it inside `canvas`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None
    # <metadata> repeats the licence namespaces of RDF in every figure and says nothing.
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = body.replace("url(#", f"url(#{name}-")
    for token, variable in TOKENS.items():
        body = body.replace(token, variable)
    link = ' xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg xmlns="http://www.w3.org/2000/svg"{link} {view.group()} aria-hidden="true">{body}'
