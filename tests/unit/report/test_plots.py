"""Figures: deterministic, themed by variables, and true to their numbers."""

from __future__ import annotations

import zlib
from html import escape

import numpy as np
import pytest

from fmdeploy.evaluate.bootstrap import Interval
from fmdeploy.evaluate.plots.accuracy import Curve, plot_channels, plot_slices
from fmdeploy.evaluate.plots.calibration import Bins, plot_reliability
from fmdeploy.evaluate.plots.figure import TOKENS, canvas, to_svg
from fmdeploy.evaluate.plots.latency import plot_latency
from fmdeploy.evaluate.plots.probes import Growth, plot_probes
from fmdeploy.evaluate.plots.raster import data_uri, png_bytes
from fmdeploy.evaluate.plots.training import running_mean

NAN = float("nan")


def curve(name: str, look: str, *values: float) -> Curve:
    return Curve(name, look, tuple(Interval(v, v - 0.1, v + 0.1, 9, 3) for v in values))


def test_figures_are_deterministic_and_use_the_page_colours() -> None:
    first, second = (plot_channels("iou", ["t", "+1s"], [curve("teacher", "teacher", 0.5, 0.4)]) for _ in range(2))
    assert first == second
    assert "var(--teacher)" in first.svg
    assert not any(token in first.svg for token in TOKENS)
    assert "teacher: 0.500, 0.400" in first.alt


def test_text_stays_text() -> None:
    picture = plot_slices("iou", ["weather=fog", "rare"], [curve("student", "student", 0.5, 0.4)])
    assert ">weather=fog</text>" in picture.svg
    assert 'id="slices-' in picture.svg


@pytest.mark.parametrize("name", ["$\\frac$", "a $x$ b", "</text><script>"])
def test_names_are_drawn_as_they_are(name: str) -> None:
    """Folders and slices are named by users: no formula, no markup."""
    points = np.array([[0.0, 9.0], [0.1, 0.2], [0.0, 0.1], [0.2, 0.3]])
    growths = [Growth(name, "teacher", {"linear": points}), Growth("other", "student", {"linear": points})]
    drawn = plot_slices("iou", [name], [curve(name, "student", 0.5)]).svg, plot_probes(growths, {"linear": name}).svg
    for svg in drawn:
        assert f">{escape(name)}</text>" in svg
        assert "<script>" not in svg


def test_a_logarithmic_axis_has_plain_numbers() -> None:
    confidence = np.array([0.1, 0.9])
    bins = Bins("student", "student", confidence, confidence, np.array([5.0, 50_000.0]), 0.1)
    svg = plot_reliability("ece", [bins]).svg
    assert ">10000</text>" in svg
    assert "mathdefault" not in svg


def test_interval_without_ends_has_no_whisker_and_no_warning() -> None:
    lonely = Curve("student", "student", (Interval(0.5, NAN, NAN, 5, 1),))
    assert "NaN" not in plot_slices("iou", ["rare"], [lonely]).svg


def test_latency_of_one_value_is_drawn() -> None:
    picture = plot_latency({"fp32": np.full(5, 2.0)}, {"fp32": "student"})
    assert "p50 2 ms" in picture.alt


def test_figures_do_not_stay_open() -> None:
    import matplotlib.pyplot as plt

    with canvas("x", 1, 1) as (figure, axes):
        axes.plot([0, 1])
        assert to_svg(figure, "x").startswith("<svg ")
    assert plt.get_fignums() == []


def test_png_round_trip() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    raw = png_bytes(image)
    from io import BytesIO

    from matplotlib.image import imread

    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    assert np.array_equal(np.round(imread(BytesIO(raw))[..., :3] * 255).astype(np.uint8), image)
    assert data_uri(image).startswith("data:image/png;base64,iVBOR")
    assert zlib.crc32(raw) == zlib.crc32(png_bytes(image))


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_running_mean_of_a_constant_is_the_constant(value: float) -> None:
    assert np.allclose(running_mean(np.full(50, value)), value)
