"""Histograms that nothing but the values decides, the calibrators that read them, and the float16 grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmdeploy.errors import ConfigError, DataError
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.calibrators import PERCENT, calibrators, divergences, entropy, mean_squared_error, squared_errors
from fmdeploy.quantize.grid import SMALLEST, STEPS, fp16_amax
from fmdeploy.quantize.histogram import Histogram

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def _of(*tensors: Tensor) -> Histogram:
    histogram = Histogram()
    for tensor in tensors:
        histogram.add(tensor)
    return histogram


def _laplace(count: int = 20_000, seed: int = 0) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).laplace(size=count), dtype=torch.float32)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(FLOATS, min_size=1, max_size=60), data=st.data())
def test_state_depends_on_the_values_alone(values: list[float], data: st.DataObject) -> None:
    whole = torch.tensor(values, dtype=torch.float32)
    shuffled = whole[torch.tensor(data.draw(st.permutations(range(len(values)))))]
    cut = data.draw(st.integers(0, len(values)))
    parts = _of(shuffled[:cut], shuffled[cut:])
    assert parts.digest == _of(whole).digest
    one, other = _of(shuffled[:cut]), _of(shuffled[cut:])
    before = one.digest
    assert one.merge(other).digest == other.merge(one).digest == parts.digest
    assert one.digest == before


@settings(max_examples=50, deadline=None)
@given(values=st.lists(FLOATS, min_size=1, max_size=60))
def test_bins_hold_their_values(values: list[float]) -> None:
    exact = np.abs(np.array(values, np.float32)).astype(np.float64)
    histogram = _of(torch.tensor(values, dtype=torch.float32))
    centres, counts = histogram.magnitudes()
    assert histogram.total == len(values)
    assert histogram.zeros + counts.sum() == len(values)
    kept = np.sort(exact)[histogram.zeros :]
    assert np.abs(np.repeat(centres, counts) - kept).max(initial=0) <= 2.0**-11 * kept.max(initial=2.0**-126)
    assert histogram.largest == exact.max()
    if exact.max() < 1e18:  # squares fit float64 easily
        assert histogram.root_mean_square() == pytest.approx(np.sqrt((exact**2).mean()), rel=2.0**-10, abs=1e-40)


def test_counting_late_is_the_same_as_counting_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = _laplace()
    late = _of(x[:7], x[7:]).digest
    monkeypatch.setattr("fmdeploy.quantize.histogram.FLUSH", 1)
    assert _of(x[:7], x[7:]).digest == late


def test_uniform_bins_are_exact_counts_of_the_values() -> None:
    x = _laplace()
    counts, width = _of(x).uniform()
    wanted = np.bincount(np.floor(x.abs().double().numpy() / width).astype(int))
    assert np.array_equal(counts, wanted)
    assert 2048 < len(counts) <= 4096
    assert np.log2(width) == int(np.log2(width))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    with pytest.raises(DataError, match="layer3: calibration drove this tensor to NaN or infinity"):
        Histogram().add(torch.tensor([1.0, bad]), where="layer3")


def test_zeros_decide_nothing() -> None:
    x = _laplace()
    plain, padded = _of(x), _of(x, torch.zeros(500_000))
    assert padded.zeros == 500_000
    for name, amax in calibrators().items():
        assert amax(padded) == amax(plain), name
    assert padded.root_mean_square() < plain.root_mean_square()
    assert _of(torch.zeros(5)).percentile(99.9) == 0
    assert all(amax(_of(torch.zeros(5))) == 0 for amax in calibrators().values())


def test_percentile_and_what_it_clips() -> None:
    x = _laplace()
    histogram = _of(x)
    assert histogram.percentile(99) == pytest.approx(float(np.quantile(x.abs().numpy(), 0.99)), rel=1e-2)
    assert histogram.percentile(100) == histogram.largest == float(x.abs().max())
    assert histogram.share_above(histogram.percentile(99)) == pytest.approx(0.01, abs=1e-3)
    with pytest.raises(ConfigError, match=r"percentile.*expected 50 to 100, found 0.99"):
        calibrators(0.99)  # 99 % was meant


def _true_error(x: Tensor, amax: float) -> float:
    step = amax / STEPS
    held = torch.clamp(torch.round(x.abs().double() / step), max=STEPS) * step
    return float(((held - x.abs().double()) ** 2).sum())


def test_squared_errors_are_those_of_quantising_the_values() -> None:
    x = _laplace()
    ranges = float(x.abs().max()) * np.array([1.0, 0.7, 0.4, 0.1, 0.02])
    found = squared_errors(_of(x), ranges)
    assert found == pytest.approx([_true_error(x, amax) for amax in ranges], rel=0.01)


@pytest.mark.parametrize("shape", ["laplace", "outliers", "uniform"])
def test_mse_finds_the_least_error(shape: str) -> None:
    x = _laplace(200_000)
    x = {"laplace": x, "outliers": torch.cat([x, torch.tensor([60.0, -55.0])]), "uniform": torch.rand(20_000)}[shape]
    amax = mean_squared_error(_of(x))
    least = min(_true_error(x, float(x.abs().max()) * ratio) for ratio in np.linspace(0.02, 1, 150))
    assert _true_error(x, amax) <= 1.01 * least
    assert amax <= float(x.abs().max())
    if shape == "uniform":
        assert amax > 0.98
    else:
        assert amax < 0.9 * float(x.abs().max())


@pytest.mark.parametrize("seed", range(3))
def test_entropy_agrees_with_modelopt(seed: int) -> None:
    modelopt.load()
    from modelopt.torch.quantization.calib.histogram import _compute_amax_entropy

    x = _laplace(8000, seed).abs().numpy()
    counts, edges = np.histogram(x, bins=400, range=(0, x.max()))
    counts += 1  # an empty last bin is where this implementation goes on and the recipe does not
    wanted = float(_compute_amax_entropy(counts.copy(), edges, 8, False))
    divergence = divergences(counts)
    assert edges[128 + len(divergence) - 1 - np.argmin(divergence[::-1])] == pytest.approx(wanted)


def test_divergence_has_its_definition() -> None:
    counts = np.random.default_rng(0).integers(0, 50, 200)
    counts[0] = counts[1] = 7
    size = 160
    p = counts[:size].astype(float)
    q = np.zeros(size)
    for level in range(128):
        group = np.arange(-(-size * level // 128), -(-size * (level + 1) // 128))
        filled = group[counts[group] > 0]
        q[filled] = counts[group].sum() / max(len(filled), 1)
    p[-1] += counts[size:].sum()
    p, q = p / p.sum(), q / q.sum()
    wanted = np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))
    assert counts[size - 1] > 0
    assert divergences(counts)[size - 128] == pytest.approx(wanted)


def test_entropy_cuts_outliers_and_keeps_a_uniform_tensor() -> None:
    x = _laplace(100_000)
    outliers = torch.cat([x, torch.tensor([400.0, -300.0])])
    assert entropy(_of(outliers)) < 40
    assert entropy(_of(torch.rand(100_000))) > 0.99
    assert entropy(_of(torch.tensor([0.0, 1.0, 1.0, 0.0]))) == 1.0


def test_entropy_keeps_the_few_values_of_a_coarse_input() -> None:
    grey = torch.tensor(np.random.default_rng(0).integers(0, 17, 50_000) / 16, dtype=torch.float32)
    assert entropy(_of(grey)) == 1.0
    mostly_one_value = torch.cat([torch.full((50_000,), 0.3), _laplace(20_000)])
    assert entropy(_of(mostly_one_value)) > float(_laplace(20_000).abs().quantile(0.96))


def test_the_usual_percentile_is_the_default() -> None:
    histogram = _of(_laplace(200_000))
    assert calibrators()["percentile"](histogram) == histogram.percentile(PERCENT)


@settings(max_examples=300, deadline=None)
@given(amax=st.floats(0, 8e6, width=32))
def test_ranges_on_the_grid_have_scales_that_float16_holds(amax: float) -> None:
    wanted = torch.tensor(amax)
    found = fp16_amax(wanted)
    scale = found / STEPS
    assert found.dtype == torch.float32
    assert found >= wanted
    assert float(scale) == float(scale.half())
    assert scale >= SMALLEST
    if amax > STEPS * 2.0**-14:  # the scale is a normal float16 number
        assert float(found) <= amax * (1 + 2.0**-10)
    smaller = float(np.nextafter(np.float16(float(scale)), np.float16(0)))
    assert smaller * STEPS < amax or float(scale) == SMALLEST, "there is a smaller range that would do"
    assert torch.equal(fp16_amax(found), found)


def test_the_grid_works_on_whole_tensors_and_refuses_what_it_cannot_hold() -> None:
    amax = torch.rand(16, 1, 3, 3) * 5
    found = fp16_amax(amax)
    assert found.shape == amax.shape
    assert torch.equal(found[3, 0, 1], torch.stack([fp16_amax(each) for each in amax[3, 0, 1]]))
    for bad in (-1.0, float("nan"), float("inf"), 9e6):
        with pytest.raises(DataError, match="does not fit a float16 scale"):
            fp16_amax(torch.tensor([1.0, bad]))
