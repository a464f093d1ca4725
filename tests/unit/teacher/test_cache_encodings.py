"""Encodings keep the bounds that their documentation states, and refuse what they cannot store."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fmdeploy.errors import ArtifactError, ConfigError, DataError
from fmdeploy.task import Array
from fmdeploy.teacher.encodings.base import MAIN, Encoding, require_finite
from fmdeploy.teacher.encodings.floats import Float16, Float32
from fmdeploy.teacher.encodings.int8 import Int8
from fmdeploy.teacher.encodings.pca import Moments
from fmdeploy.teacher.encodings.probability import Probability
from fmdeploy.teacher.encodings.registry import make, read_feature, read_output
from fmdeploy.teacher.encodings.topk import TopK

QUICK = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))


def values(limit: float, shapes: st.SearchStrategy[tuple[int, ...]] = SHAPES) -> st.SearchStrategy[Array]:
    return arrays(np.float32, shapes, elements=st.floats(-limit, limit, width=32))


def round_trip(encoding: Encoding, value: Array) -> Array:
    parts = encoding.encode(value)
    for name, part in encoding.parts().items():
        assert (parts[name].dtype, parts[name].shape) == (part.dtype, (len(value), *part.shape)), name
    assert set(parts) == set(encoding.parts())
    decoded = encoding.decode(parts)
    assert decoded.shape == value.shape
    assert decoded.dtype.kind == "f"
    return decoded


@given(values(2.0**99))
@QUICK
def test_float32_is_exact(value: Array) -> None:
    assert np.array_equal(round_trip(Float32(value.shape[1:]), value), value)


@given(values(65504.0))
@QUICK
def test_float16_keeps_eleven_bits(value: Array) -> None:
    error = np.abs(round_trip(Float16(value.shape[1:]), value).astype(np.float64) - value)
    assert (error <= np.abs(value) * 2.0**-11 + 2.0**-25).all()


@given(values(8e6), st.booleans())
@QUICK
def test_int8_is_off_by_half_a_step_at_most(value: Array, is_feature: bool) -> None:
    encoding = make("x", read_feature("int8"), value.shape[1:], is_feature=is_feature)
    assert isinstance(encoding, Int8)
    axis = (1,) if is_feature else (2, 3)
    largest = np.abs(value).max(axis, keepdims=True).astype(np.float64)
    scale = np.expand_dims(encoding.encode(value)["scale"].astype(np.float64), axis)
    assert (scale >= largest / 127).all()
    assert (scale <= largest / 127 * (1 + 2.0**-10) + 2.0**-24).all()
    assert (np.abs(round_trip(encoding, value) - value.astype(np.float64)) <= scale / 2 * (1 + 1e-5)).all()


@given(values(50.0))
@QUICK
def test_uint8_probabilities_are_off_by_half_a_step_at_most(value: Array) -> None:
    decoded = round_trip(Probability(value.shape[1:]), value).astype(np.float64)
    assert np.abs(1 / (1 + np.exp(-decoded)) - 1 / (1 + np.exp(-value.astype(np.float64)))).max() <= 1 / 510 + 1e-7


@given(st.data())
@QUICK
def test_top_k_is_within_its_bound(data: st.DataObject) -> None:
    logits_BC = data.draw(values(30.0, st.tuples(st.integers(1, 4), st.integers(1, 12))))
    keep = data.draw(st.integers(1, logits_BC.shape[1]))
    found_BC = softmax(round_trip(TopK(logits_BC.shape[1:], keep), logits_BC))
    wanted_BC = softmax(logits_BC)
    rest_B = np.sort(wanted_BC, axis=1)[:, : logits_BC.shape[1] - keep].sum(1)
    assert (0.5 * np.abs(found_BC - wanted_BC).sum(1) <= rest_B + 2.0**-10 * np.log(keep + 1) + 1e-6).all()


def test_top_k_keeps_the_order_of_what_it_keeps_and_spreads_the_rest_evenly() -> None:
    decoded_BC = round_trip(TopK((6,), 2), np.array([[0.0, 5.0, -1.0, 3.0, 1.0, -9.0]], np.float32))
    assert decoded_BC.argsort(1)[0, -2:].tolist() == [3, 1]
    assert len(set(decoded_BC[0, [0, 2, 4, 5]].tolist())) == 1
    assert softmax(decoded_BC).sum() == pytest.approx(1)


def softmax(logits_BC: Array) -> Array:
    weight_BC = np.exp(logits_BC.astype(np.float64) - logits_BC.max(1, keepdims=True))
    return np.asarray(weight_BC / weight_BC.sum(1, keepdims=True))


def pca(value: Array, text: str) -> Encoding:
    moments = Moments(value.shape[1])
    moments.add(value)
    spelling = read_feature(text)
    return make("x", spelling, value.shape[1:], is_feature=True, state=moments.components(spelling.amount))


def maps_of_rank(rank: int, *, channels: int = 12, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    weights_CR = rng.normal(size=(channels, rank)) * np.geomspace(1, 0.1, rank)
    return np.asarray(np.einsum("cr,brhw->bchw", weights_CR, rng.normal(size=(16, rank, 4, 4))) + 3, np.float32)


@given(st.integers(1, 6), st.integers(0, 99))
@QUICK
def test_pca_loses_nothing_of_maps_that_its_components_span(rank: int, seed: int) -> None:
    value = maps_of_rank(rank, seed=seed)
    encoding = pca(value, f"pca:{rank}+float32")
    assert encoding.parts()[MAIN].shape == (rank, 4, 4)
    np.testing.assert_allclose(round_trip(encoding, value), value, atol=1e-3)


@given(st.floats(0.05, 0.99), st.integers(0, 99))
@QUICK
def test_pca_keeps_the_share_of_the_variance_that_was_asked_for(share: float, seed: int) -> None:
    value = np.random.default_rng(seed).normal(size=(8, 6, 3, 3)).astype(np.float32)
    lost = np.square(round_trip(pca(value, f"pca:{share}+float32"), value) - value.astype(np.float64)).sum()
    centred = value - value.mean((0, 2, 3), keepdims=True, dtype=np.float64)
    assert lost <= (1 - share) * np.square(centred).sum() + 1e-4


def test_pca_composes_with_int8_in_a_fraction_of_the_bytes() -> None:
    value = maps_of_rank(4, channels=64)
    encoding = pca(value, "pca:4+int8")
    assert sum(part.size for part in encoding.parts().values()) == 16 * (4 + 2)
    decoded, flat = round_trip(encoding, value), value.reshape(-1)
    assert float(decoded.reshape(-1) @ flat / np.linalg.norm(decoded) / np.linalg.norm(flat)) > 0.9999


def test_equal_tokens_give_equal_components() -> None:
    first, again = (pca_state(maps_of_rank(5)) for _ in range(2))
    assert all(np.array_equal(first[name], again[name]) for name in ("basis", "mean"))
    assert (np.take_along_axis(first["basis"], np.abs(first["basis"]).argmax(1)[:, None], 1) > 0).all()


def pca_state(value: Array) -> dict[str, Array]:
    moments = Moments(value.shape[1])
    moments.add(value)
    return moments.components(5)


def test_int8_costs_half_of_float16_for_a_transformer() -> None:
    for channels in (208, 384):
        small, wide = (sum(part.size for part in make("x", read_feature(text), (channels, 8, 8), is_feature=True)
                           .parts().values()) for text in ("int8", "float16"))
        assert small <= 0.51 * wide


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 70000.0])
def test_what_float16_cannot_hold_is_refused(value: float) -> None:
    with pytest.raises(DataError, match="feature.x: the teacher's answer cannot be stored"):
        require_finite("feature.x", np.array([[1.0, value]], np.float32), Float16((2,)).limit)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e7])
def test_int8_notices_what_it_cannot_hold(value: float) -> None:
    with pytest.raises(FloatingPointError):
        Int8((2,), (0,)).encode(np.array([[1.0, value]], np.float32))


@pytest.mark.parametrize("text", ["", "int4", "pca:0", "pca:-3", "pca:1.5", "pca:nan", "pca:8+uint8", "topk:3", "uint8"])
def test_unknown_encodings_of_features_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no such encoding of features"):
        read_feature(text)


@pytest.mark.parametrize("text", ["", "int4", "topk", "topk:0", "topk:2.5", "topk:x", "pca:3"])
def test_unknown_encodings_of_outputs_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no such encoding of outputs"):
        read_output(text)


def test_a_spelling_is_made_canonical() -> None:
    assert [str(read_feature(text)) for text in ("pca", "pca:64", "pca:0.9+int8")] == [
        "pca:0.99+float16", "pca:64+float16", "pca:0.9+int8"]


@pytest.mark.parametrize(("shape", "keep"), [((5, 4, 4), 3), ((2,), 3)])
def test_top_k_of_planes_or_of_too_few_classes_is_refused(shape: Any, keep: int) -> None:
    with pytest.raises(ConfigError, match="bev: only a vector of at least K classes"):
        make("bev", read_output(f"topk:{keep}"), shape, is_feature=False)


def test_components_of_another_array_are_refused() -> None:
    with pytest.raises(ArtifactError, match="the stored components do not fit"):
        make("x", read_feature("pca:2"), (7, 4, 4), is_feature=True, state=pca_state(maps_of_rank(5)))
