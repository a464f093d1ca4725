"""Order of samples, and batches made in the background."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmdeploy.errors import ConfigError
from fmdeploy.training import sampler
from fmdeploy.training.loader import Prefetcher
from fmdeploy.training.sampler import mirror_mask, my_part, step_index


@given(count=st.integers(1, 50), batch=st.integers(1, 20), seed=st.integers(0, 99))
def test_every_epoch_shows_every_sample_once(count: int, batch: int, seed: int) -> None:
    steps = -(-3 * count // batch)
    shown = np.concatenate([step_index(count, batch, seed=seed, step=step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(shown[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_order_and_mirroring_are_functions_of_seed_and_step() -> None:
    assert np.array_equal(step_index(100, 8, seed=3, step=50), step_index(100, 8, seed=3, step=50))
    assert not np.array_equal(step_index(100, 8, seed=3, step=50), step_index(100, 8, seed=4, step=50))
    assert np.array_equal(mirror_mask(64, seed=3, step=9), mirror_mask(64, seed=3, step=9))
    share = np.mean([mirror_mask(64, seed=0, step=step).mean() for step in range(100)])
    assert 0.48 < share < 0.52


def test_processes_and_parts_cut_a_batch_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(24)
    pieces = []
    for rank in range(3):
        monkeypatch.setattr(sampler, "world", lambda rank=rank: (rank, 3))
        pieces += [my_part(values, part, 2) for part in range(2)]
    assert all(len(piece) == 4 for piece in pieces)
    assert sorted(np.concatenate(pieces)) == list(range(24))


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be cut into equal parts"):
        my_part(np.arange(7), 0, 2)


def test_batches_come_in_order_and_are_made_ahead() -> None:
    made: list[int] = []

    def make(key: int) -> int:
        made.append(key)
        return key * 10

    loader = Prefetcher(make, iter(range(5)), depth=2)
    assert [loader.take() for _ in range(2)] == [0, 10]
    time.sleep(0.1)
    assert len(made) > 2
    loader.close()


def test_an_error_in_the_background_reaches_the_training_loop() -> None:
    def make(key: int) -> int:
        raise ConfigError(f"no batch {key}")

    loader = Prefetcher(make, iter(range(5)))
    with pytest.raises(ConfigError, match="no batch 0"):
        loader.take()
    loader.close()
