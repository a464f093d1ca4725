"""Masks: equal counts, disjoint sets, and the same draw whatever the neighbours are."""

from __future__ import annotations

import numpy as np
import pytest

from fmdeploy.teacher.objectives.masking import block_shapes, random_blocks, random_parts


def _rngs(count: int, first: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng((7, place)) for place in range(first, first + count)]


def test_random_parts_are_disjoint_and_cover_what_they_should() -> None:
    parts = random_parts(16, (5, 4, 7), _rngs(6))
    assert [part.shape for part in parts] == [(6, 5), (6, 4), (6, 7)]
    for row in np.concatenate(parts, axis=1):
        assert sorted(row) == list(range(16))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert len({tuple(row) for row in parts[0]}) > 1


def test_every_token_is_hidden_equally_often() -> None:
    (hidden,) = random_parts(16, (4,), _rngs(4000))
    share = np.bincount(hidden.ravel(), minlength=16) / 4000
    assert np.abs(share - 0.25).max() < 0.03  # four standard deviations


@pytest.mark.parametrize("side", [4, 8])
def test_blocks_are_rectangles_of_one_area(side: int) -> None:
    found_BTM = random_blocks(side, blocks=3, share=0.15, rngs=_rngs(200))
    area = found_BTM.shape[2]
    assert found_BTM.shape == (200, 3, area)
    assert found_BTM.dtype == np.int64
    for block in found_BTM.reshape(-1, area):
        rows, columns = np.unique(block // side), np.unique(block % side)
        assert len(rows) * len(columns) == area == len(set(block))
        assert (np.diff(rows) == 1).all()
        assert (np.diff(columns) == 1).all()
    assert set(found_BTM.ravel()) == set(range(side * side))


def test_block_shapes_have_one_area_and_no_long_side() -> None:
    assert block_shapes(8, 0.15) == [(3, 3)]
    assert set(block_shapes(8, 0.19)) == {(3, 4), (4, 3)}


def test_a_sample_draws_the_same_in_any_batch() -> None:
    whole = random_blocks(8, blocks=2, share=0.2, rngs=_rngs(6))
    np.testing.assert_array_equal(whole[3:5], random_blocks(8, blocks=2, share=0.2, rngs=_rngs(2, first=3)))
