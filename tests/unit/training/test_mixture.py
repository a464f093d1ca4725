from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmdeploy.data.blocks import Blocks
from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.errors import ConfigError
from fmdeploy.subset import Subset
from fmdeploy.task import Array, Arrays
from fmdeploy.tasks.bev_occupancy import BevOccupancy
from fmdeploy.training.batches import SupervisedBatches
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.losses import class_loss, soft_dice, weighted_bce
from fmdeploy.training.mixture import options
from fmdeploy.training.mixture.joined import Joined, replay_buffer
from fmdeploy.training.mixture.options import Mixture
from fmdeploy.training.mixture.rates import bounded, rates_of, temperature_factors, with_share
from fmdeploy.training.mixture.recipe import MixtureRecipe, read_recipe
from fmdeploy.training.mixture.sampler import MixtureSampler, systematic_counts
from fmdeploy.training.sampler import make_sampler

rates = st.lists(st.floats(0.05, 4.0), min_size=3, max_size=200).map(lambda values: np.array(values) / np.mean(values))


class Toy:
    """Samples that carry their own number."""

    def __init__(self, count: int, start: int = 0, rare: float = 0.05) -> None:
        self.number_N = np.arange(start, start + count)
        self.ids = tuple(f"drive{k // 10}/{k}" for k in self.number_N)
        self.groups = self.number_N // 10
        rng = np.random.default_rng(0)
        self.slices = {"rare": np.where(rng.random(count) < rare, "cut-in", "none"),
                       "weather": np.where(np.arange(count) % 4 == 0, "fog", "clear")}

    def __len__(self) -> int:
        return len(self.number_N)

    def batch(self, index: Array) -> tuple[Arrays, Arrays]:
        return {"x": self.number_N[index, None].astype(np.float32)}, {"label": self.number_N[index]}

    def frames(self, index: Array, offsets: list[int]) -> Array:
        return np.asarray(self.number_N[index][:, None] + np.array(offsets))


@given(rates, st.integers(0, 2**31))
def test_counts_are_the_rates_rounded_and_add_up(rate_N: Array, seed: int) -> None:
    count_N = systematic_counts(rate_N, np.random.default_rng(seed))
    assert count_N.sum() == len(rate_N)
    assert (np.abs(count_N - rate_N) < 1 + 1e-6).all()


def test_over_many_epochs_every_sample_is_seen_at_its_rate() -> None:
    rate_N = np.array([0.25, 0.5, 1.0, 2.25, 1.0])
    sampler = MixtureSampler(rate_N, 5, seed=3)
    seen = np.bincount(np.concatenate([sampler.index(step) for step in range(4000)]), minlength=5) / 4000
    np.testing.assert_allclose(seen, rate_N, atol=0.03)


def test_the_order_is_a_function_of_seed_and_step() -> None:
    def steps(sampler: MixtureSampler, wanted: list[int]) -> list[list[int]]:
        return [sampler.index(step).tolist() for step in wanted]

    rate_N = np.random.default_rng(0).uniform(0.3, 2.0, 50)
    forward, again = (MixtureSampler(rate_N, 8, seed=1) for _ in range(2))
    assert steps(forward, list(range(30))) == steps(again, list(range(29, -1, -1)))[::-1]
    assert steps(MixtureSampler(rate_N, 8, seed=2), [0]) != steps(again, [0])


def test_draws_stay_in_windows_when_samples_do_not_fit_in_memory() -> None:
    """Two blocks of ten fit a window: a run of draws touches two of them at a time."""
    blocks = Blocks(np.repeat(np.arange(20), 100).astype(np.int32), np.full(20, 1000), budget=4000)
    rate_N = np.where(np.arange(2000) % 7 == 0, 3.0, 0.7)
    sampler = MixtureSampler(rate_N / rate_N.mean(), 50, seed=0, blocks=blocks)
    drawn = np.concatenate([sampler.index(step) for step in range(40)])
    touched = [len(np.unique(blocks.block_N[drawn[start : start + 50]])) for start in range(0, 2000, 50)]
    assert max(touched) <= 4
    share = (rate_N[drawn] == 3.0).mean()
    assert share == pytest.approx(3 * 286 / (3 * 286 + 0.7 * 1714), abs=0.01)


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=100), st.floats(1.1, 20))
def test_rates_keep_their_bounds_and_their_order(wanted: list[float], most: float) -> None:
    wanted_N = np.array(wanted)
    rate_N = bounded(wanted_N, most)
    assert rate_N.mean() == pytest.approx(1.0)
    assert rate_N.max() <= most * 1.001
    assert rate_N.min() >= 1 / most / 1.001
    order = np.argsort(wanted_N, kind="stable")
    assert (np.diff(rate_N[order]) >= -1e-9).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1e6])
def test_temperature_moves_strata_from_natural_to_equal_shares(temperature: float) -> None:
    axis_N = np.repeat(["a", "b", "c"], [900, 90, 10])
    factor_N = temperature_factors([axis_N], temperature)
    share = np.array([factor_N[axis_N == name].sum() for name in "abc"]) / factor_N.sum()
    wanted = np.array([0.9, 0.09, 0.01]) ** (1 / temperature)
    np.testing.assert_allclose(share, wanted / wanted.sum(), rtol=1e-4)


def test_weights_name_slices_and_metadata() -> None:
    samples = Toy(400)
    recipe = MixtureRecipe(weights={"rare": {"cut-in": 3.0}, "weather": {"fog": 2.0}})
    rate_N = rates_of(recipe, samples, ())
    rare, fog = samples.slices["rare"] == "cut-in", samples.slices["weather"] == "fog"
    assert rate_N[rare & ~fog].mean() / rate_N[~rare & ~fog].mean() == pytest.approx(3.0)
    assert rate_N[fog & ~rare].mean() / rate_N[~rare & ~fog].mean() == pytest.approx(2.0)
    assert rate_N.max() <= 4.0
    by_label = rates_of(MixtureRecipe(weights={"label": {"7": 2.0, "300": 4.0}}), samples, ())
    assert by_label[7] / by_label[8] == pytest.approx(2.0)
    assert by_label[300] / by_label[8] == pytest.approx(4.0, rel=0.05)
    sequences = [SequenceInfo(f"drive{k}", "x", 10, {"place": "north" if k < 20 else "south"}) for k in range(40)]
    by_place = rates_of(MixtureRecipe(weights={"place": {"north": 3.0}}), samples, sequences)
    assert by_place[0] / by_place[399] == pytest.approx(3.0)
    with pytest.raises(ConfigError, match="no sample has rare 'moose'.*cut-in"):
        rates_of(MixtureRecipe(weights={"rare": {"moose": 2.0}}), samples, ())
    with pytest.raises(ConfigError, match="no sample has such an axis.*rare, weather"):
        rates_of(MixtureRecipe(axes=("planet",), temperature=2), samples, ())


@pytest.mark.parametrize(("text", "message"), [
    ("temperature = 0.5", "temperature"), ("[weights.rare]\ncut-in = -1.0", "greater than 0"),
    ("max_oversampling = 0.5", "max_oversampling"), ("tempreature = 2.0", "did you mean 'temperature'"),
    ("representation = \"all\"", "representation"), ("weights = 3", "weights"),
])
def test_a_bad_recipe_is_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(tmp_path / "m.toml")


def test_joined_samples_are_those_of_their_parts() -> None:
    joined = Joined({"new": Toy(30), "old0": Toy(20, start=100)})
    index = np.array([45, 3, 30, 29, 3])
    inputs, targets = joined.batch(index)
    assert targets["label"].tolist() == [115, 3, 100, 29, 3]
    assert inputs["x"][:, 0].tolist() == [115, 3, 100, 29, 3]
    assert joined.frames(index, [0, 2]).tolist() == [[n, n + 2] for n in (115, 3, 100, 29, 3)]
    assert joined.ids[30] == "old0:drive10/100"
    assert joined.slices["domain"].tolist() == ["new"] * 30 + ["old0"] * 20
    assert not set(joined.groups[:30]) & set(joined.groups[30:])


def test_a_buffer_from_data_that_do_not_fit_in_memory_is_drawn_in_windows() -> None:
    large = Toy(100)
    large.blocks = Blocks(np.arange(100) // 10, np.full(10, 100), 300)  # type: ignore[attr-defined]
    buffer = Subset(large, np.arange(0, 100, 2))
    order = make_sampler(buffer, 5, seed=0)
    blocks = [len(np.unique(buffer.index[order.index(step)] // 10)) for step in range(10)]
    assert max(blocks) <= 2
    assert Subset(Toy(10), np.arange(3)).blocks is None


def test_a_buffer_remembers_rare_cases() -> None:
    samples = Toy(2000, rare=0.02)
    kept = replay_buffer(samples, 200, seed=0)
    assert len(np.unique(kept)) == 200
    rare = samples.slices["rare"] == "cut-in"
    assert rare[kept].sum() == rare.sum()  # all of them: 40 of 2000, in strata of their own
    assert replay_buffer(samples, 200, seed=0).tolist() == kept.tolist() != replay_buffer(samples, 200, seed=1).tolist()
    part = Subset(samples, kept)
    assert part.frames(np.array([1]), [0]).tolist() == [[kept[1]]]
    with pytest.raises(AttributeError):
        part.anything  # noqa: B018
    with pytest.raises(ConfigError, match="larger than the domain"):
        replay_buffer(samples, 2001, seed=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_importance_weights_undo_the_oversampling(seed: int) -> None:
    """The expected weighted loss of draws at rate r is the natural mean: weights 1 / r."""
    rng = np.random.default_rng(seed)
    loss_N, rate_N = rng.random(300), bounded(rng.uniform(0.2, 5.0, 300), 3.0)
    assert (rate_N * loss_N / rate_N).mean() == pytest.approx(loss_N.mean())
    sampler = MixtureSampler(rate_N, 300, seed=seed)
    drawn = np.concatenate([sampler.index(step) for step in range(60)])
    assert (loss_N[drawn] / rate_N[drawn]).mean() == pytest.approx(loss_N.mean(), rel=0.03)


def test_weights_average_one_over_the_draws_from_a_part_of_the_samples() -> None:
    rate_N, part = np.array([0.5, 0.5, 1.0, 2.0]), np.array([2, 3])
    mixture = Mixture(Toy(4), rate_N, importance=True)
    draws = mixture.draws(part)
    drawn = np.concatenate([draws.sampler(6, 0).index(step) for step in range(20)])
    weights = draws.weights(drawn)
    assert weights is not None
    assert weights.mean() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("importance", [False, True])
def test_few_labels_of_the_new_domain_leave_the_old_one_its_share(importance: bool) -> None:
    joined = Joined({"new": Toy(400), "old0": Toy(200, start=1000)})
    rate_N = np.repeat([0.4 * 1.5, 0.6 * 3.0], [400, 200])  # 60 % of all draws are old
    mixture = Mixture(joined, rate_N, importance, replay_share=0.6)
    index = mixture.labelled(0.1, seed=0)
    assert index is not None
    assert mixture.supervision(index) == {"samples": 40, "of": 400}
    for among in (None, index):
        draws = mixture.draws(among)
        drawn = np.concatenate([draws.sampler(24, 0).index(step) for step in range(200)])
        assert (drawn >= 400).mean() == pytest.approx(0.6, abs=0.01)
        weights = draws.weights(drawn)
        if importance:
            assert weights is not None
            assert weights.mean() == pytest.approx(1.0, abs=0.02)
            assert weights[drawn >= 400].sum() / weights.sum() == pytest.approx(200 / (600 if among is None else 240), abs=0.02)
    old = np.arange(400, 600)
    assert mixture.draws(old).sampler(24, 0).index(0).min() >= 400


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 0.9), st.floats(2.0, 6.0))
def test_the_bound_holds_over_all_draws_of_a_mixture_with_replay(seed: int, share: float, most: float) -> None:
    rng = np.random.default_rng(seed)
    old_N = np.arange(300) >= 200
    rate_N = bounded(rng.lognormal(0, 1.5, 300), most)
    if not (1 / most <= 3 * share <= most and 1 / most <= 1.5 * (1 - share) <= most):
        with pytest.raises(ConfigError, match="times as often as naturally"):
            with_share(rate_N, old_N, share, most)
        return
    found_N = with_share(rate_N, old_N, share, most)
    assert found_N.mean() == pytest.approx(1.0)
    assert found_N[old_N].sum() / 300 == pytest.approx(share)
    assert found_N.max() <= most * 1.001
    assert found_N.min() >= 1 / most / 1.001
    for side_N in (old_N, ~old_N):
        assert (np.diff(found_N[side_N][np.argsort(rate_N[side_N])]) >= -1e-9).all()


def test_a_share_that_the_bound_does_not_allow_is_refused_with_a_way_out() -> None:
    rate_N, old_N = np.ones(1000), np.arange(1000) >= 950
    with pytest.raises(ConfigError, match=r"share of 0\.25 draws the 50 old of 1,000 samples 5 times as often") as caught:
        with_share(rate_N, old_N, 0.25, 4.0)
    assert "max_oversampling = 5 or more, or --replay-share 0.2" in str(caught.value)
    assert with_share(rate_N, old_N, 0.25, 5.0).max() == pytest.approx(5.0)
    assert with_share(rate_N, old_N, 0.2, 4.0).max() == pytest.approx(4.0)
    assert with_share(rate_N, old_N, 0.25, None)[-1] == pytest.approx(5.0)  # replay alone, without a recipe


@pytest.mark.parametrize(("share", "most"), [(0.25, 1.0), (0.99, 1e-6 + 1)])
def test_a_bound_next_to_one_suggests_no_share_that_it_refuses(share: float, most: float) -> None:
    rate_N, old_N = np.ones(51), np.arange(51) >= 40
    with pytest.raises(ConfigError, match=r"Set max_oversampling = [\d.]+ or more\.?$"):
        with_share(rate_N, old_N, share, most)


@pytest.mark.parametrize("count", range(1, 50))
def test_the_natural_share_is_within_any_bound(count: int) -> None:
    """Out of which rounding took some of them."""
    rate_N, old_N = np.ones(49 + count), np.arange(49 + count) >= 49
    assert with_share(rate_N, old_N, count / (49 + count), 1.0) == pytest.approx(1.0)


@pytest.mark.parametrize("importance", [False, True])
def test_the_bound_of_a_recipe_holds_among_few_labels_without_replay(importance: bool) -> None:
    """Of a quarter of the labels, all but one sample are among the rarest: they are most of what is drawn from."""
    rate_N = bounded(np.repeat([0.01, 1.0, 100.0], [100, 299, 1]), 3.0)
    mixture, index = Mixture(Toy(400), rate_N, importance, most=3.0), np.append(np.arange(99), 399)
    draws = mixture.draws(index)
    drawn = np.concatenate([draws.sampler(100, 0).index(step) for step in range(100)])
    seen = np.bincount(drawn, minlength=400)[index] / 100
    assert seen.max() <= 3.05
    assert seen.sum() == pytest.approx(100)
    weights = draws.weights(drawn)
    assert (weights is not None) == importance
    assert weights is None or weights.mean() == pytest.approx(1.0, abs=0.01)


def test_rates_of_few_labels_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch asks for its weights, and 100,000 rates are not bounded again for each."""
    calls = []

    def counting(*args: Any) -> Array:
        calls.append(args)
        return with_share(*args)

    monkeypatch.setattr(options, "with_share", counting)
    mixture = Mixture(Joined({"new": Toy(40), "old0": Toy(20, start=100)}), np.ones(60), True, replay_share=0.5)
    batches = SupervisedBatches(BevOccupancy(), mixture, TrainingConfig(batch=4, mirror=False), np.arange(10, 60))
    weights = [batches(step, 0)["targets"]["sample_weight"] for step in range(25)]
    assert len(calls) == 1
    assert np.mean(weights) == pytest.approx(1.0)  # two epochs of 50 draws


def test_an_array_that_changes_is_not_taken_for_what_it_was() -> None:
    mixture = Mixture(Joined({"new": Toy(40), "old0": Toy(20, start=100)}), np.ones(60), True, replay_share=0.5)
    index, numbers = np.arange(10, 60), np.arange(20, 50)
    before = mixture.draws(index).weights(numbers)
    index -= 10
    after = mixture.draws(index).weights(numbers)
    assert after == pytest.approx(mixture.draws(np.arange(50)).weights(numbers))
    assert after != pytest.approx(before)


def test_the_bound_of_a_recipe_holds_where_few_labels_are_drawn_from() -> None:
    joined = Joined({"new": Toy(400), "old0": Toy(200, start=1000)})
    rate_N = with_share(bounded(np.random.default_rng(0).lognormal(0, 1, 600), 3.0), np.arange(600) >= 400, 0.5, 3.0)
    mixture = Mixture(joined, rate_N, replay_share=0.5, most=3.0)
    index = mixture.labelled(0.25, seed=0)
    assert index is not None
    drawn = np.concatenate([mixture.draws(index).sampler(len(index), 0).index(step) for step in range(100)])
    seen = np.bincount(drawn, minlength=600)[index] / 100
    assert seen.max() <= 3.05
    assert (drawn >= 400).mean() == pytest.approx(0.5, abs=0.01)
    none = mixture.labelled(0.01, seed=0)
    with pytest.raises(ConfigError, match="times as often as naturally"):
        mixture.draws(none)


def test_weighted_losses_are_those_of_repeated_samples() -> None:
    torch.manual_seed(0)
    task = BevOccupancy()
    outputs = {"bev": torch.randn(2, 5, 64, 64), "scene": torch.randn(2, 8)}
    targets = {"bev": torch.randint(0, 2, (2, 5, 64, 64)), "scene": torch.tensor([1, 4])}
    plain = task.loss(outputs, targets)
    assert task.loss(outputs, {**targets, "sample_weight": torch.ones(2)}) == pytest.approx(plain.item(), rel=1e-6)
    repeat = torch.tensor([0, 0, 0, 1])
    repeated = task.loss({k: v[repeat] for k, v in outputs.items()}, {k: v[repeat] for k, v in targets.items()})
    weighted = task.loss(outputs, {**targets, "sample_weight": torch.tensor([1.5, 0.5])})
    assert weighted.item() == pytest.approx(repeated.item(), rel=1e-5)


def test_unknown_classes_count_nothing() -> None:
    logits, label = torch.randn(4, 3), torch.tensor([0, -1, 2, -1])
    assert class_loss(logits, label).item() == pytest.approx(class_loss(logits[[0, 2]], label[[0, 2]]).item())
    assert class_loss(logits, torch.full((4,), -1)).item() == 0.0
    assert weighted_bce(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4), (1.0,), (1.0,), torch.tensor([0.0, 2.0])) > 0
    assert soft_dice(torch.ones(2, 1, 4, 4), torch.ones(2, 1, 4, 4), torch.tensor([0.5, 1.5])).item() == pytest.approx(0)
