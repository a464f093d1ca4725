"""Masks: equal counts, disjoint sets, and the same draw whatever the neighbours are."""

from __future__ import annotations

import numpy as np
import pytest

from fmdeploy.errors import ConfigError
from fmdeploy.teacher.objectives.masking import block_masks, block_shapes, context_size, random_parts


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
def test_context_and_targets_never_meet_and_blocks_are_rectangles(side: int) -> None:
    found = block_masks(side, blocks=3, share=0.15, context=0.4, rngs=_rngs(50))
    size = context_size(side, blocks=3, share=0.15, context=0.4)
    area = found.targets_BTM.shape[2]
    assert found.context_BK.shape == (50, size)
    assert found.targets_BTM.shape == (50, 3, area)
    for context, targets in zip(found.context_BK, found.targets_BTM, strict=True):
        assert not set(context) & set(targets.ravel())
        assert len(set(context)) == size
        for block in targets:
            rows, columns = np.unique(block // side), np.unique(block % side)
            assert len(rows) * len(columns) == area == len(set(block))
            assert (np.diff(rows) == 1).all()
            assert (np.diff(columns) == 1).all()


def test_block_shapes_have_one_area_and_no_long_side() -> None:
    assert block_shapes(8, 0.15) == [(3, 3)]
    assert set(block_shapes(8, 0.19)) == {(3, 4), (4, 3)}


def test_a_sample_draws_the_same_in_any_batch() -> None:
    whole = block_masks(8, blocks=2, share=0.2, context=0.4, rngs=_rngs(6))
    part = block_masks(8, blocks=2, share=0.2, context=0.4, rngs=_rngs(2, first=3))
    np.testing.assert_array_equal(whole.context_BK[3:5], part.context_BK)
    np.testing.assert_array_equal(whole.targets_BTM[3:5], part.targets_BTM)


def test_blocks_that_may_cover_everything_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"may cover the whole picture.*Lower jepa\.blocks"):
        context_size(8, blocks=8, share=0.15, context=0.4)
