"""Learning rate, decay groups and averaged weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fmdeploy.errors import ConfigError
from fmdeploy.training.config import Schedule, TrainingConfig
from fmdeploy.training.ema import WeightAverage, floating, follow
from fmdeploy.training.schedule import decay_groups, learning_rate, make_optimizer, set_rate


def test_the_rate_rises_to_its_peak_and_falls_to_one_percent() -> None:
    config = TrainingConfig(steps=100, warmup=0.1, lr=2e-3)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(2e-4)
    assert rates[9] == rates[10] == pytest.approx(2e-3)
    assert rates[-1] == pytest.approx(2e-5)
    assert max(rates) == pytest.approx(2e-3)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert learning_rate(10 + 89 // 2, config) == pytest.approx(1.0e-3, rel=0.03)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_short_runs_have_a_rate(steps: int) -> None:
    config = TrainingConfig(steps=steps)
    assert all(0 < learning_rate(step, config) <= config.lr for step in range(steps))


def test_only_matrices_and_kernels_decay() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    model[3].weight.requires_grad_(False)
    decaying, others = decay_groups(model, 0.1)
    assert [p.shape for p in decaying["params"]] == [(3, 2, 3, 3)]
    assert len(others["params"]) == 4
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_the_average_follows_its_formula_and_includes_running_statistics() -> None:
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, decay=0.9)
    expected = model.weight.detach().clone()
    for step in range(200):
        with torch.no_grad():
            model.weight.fill_(float(step))
            assert model.running_mean is not None
            model.running_mean.fill_(7.0)
        average.update(model, step)
        keep = min(0.9, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * step
    average.copy_to(model)
    torch.testing.assert_close(model.weight.detach(), expected)
    assert model.weight[0].item() == pytest.approx(199 - 9, abs=0.1)
    assert model.running_mean is not None
    torch.testing.assert_close(model.running_mean, torch.full((2,), 7.0))


def test_a_batch_must_divide_into_its_parts() -> None:
    with pytest.raises(ValueError, match="not a multiple of accumulation"):
        TrainingConfig(batch=10, accumulation=4)


@pytest.mark.parametrize(("schedule", "middle", "last"), [("cosine", 0.505, 0.01), ("linear", 0.505, 0.01),
                                                           ("constant", 1.0, 1.0)])
def test_every_schedule_rises_first_and_ends_where_it_says(schedule: Schedule, middle: float, last: float) -> None:
    config = TrainingConfig(steps=111, warmup=10 / 111, lr=2e-3, schedule=schedule)
    rates = [learning_rate(step, config) / config.lr for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[60] == pytest.approx(middle)
    assert rates[-1] == pytest.approx(last)
    if schedule == "linear":
        assert np.diff(rates[10:]) == pytest.approx(np.full(100, -0.0099))


def test_the_backbone_may_have_a_rate_of_its_own() -> None:
    model = nn.ModuleDict({"backbone": nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "head": nn.Linear(4, 2)})
    optimizer = make_optimizer(model, TrainingConfig(lr=1e-2, backbone_lr=0.1, weight_decay=0.3))
    set_rate(optimizer, 5e-3)
    found = {name: (group["lr"], group["weight_decay"]) for name, parameter in model.named_parameters()
             for group in optimizer.param_groups if any(parameter is p for p in group["params"])}
    assert found == {"backbone.0.weight": (5e-4, 0.3), "backbone.0.bias": (5e-4, 0.0),
                     "backbone.1.weight": (5e-4, 0.0), "backbone.1.bias": (5e-4, 0.0),
                     "head.weight": (5e-3, 0.3), "head.bias": (5e-3, 0.0)}


def test_a_rate_for_a_backbone_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no trained module is called 'backbone'"):
        make_optimizer(nn.Linear(2, 2), TrainingConfig(backbone_lr=0.5))


@pytest.mark.parametrize("keep", [1.0, 0.75, 0.0])
def test_a_slow_copy_keeps_its_share_and_copies_what_is_not_averaged(keep: float) -> None:
    ours, theirs = ({"weight": torch.full((2,), value), "statistic": torch.full((2,), value),
                     "counter": torch.tensor(int(value))} for value in (2.0, 4.0))
    assert floating(ours) == {"weight", "statistic"}
    follow(ours, theirs, keep, {"weight"})
    assert ours["weight"].tolist() == [keep * 2 + (1 - keep) * 4] * 2
    assert (ours["statistic"].tolist(), int(ours["counter"])) == ([4.0, 4.0], 4)
    assert theirs["weight"].tolist() == [4.0, 4.0]


def test_what_is_never_averaged_is_copied() -> None:
    """The tokeniser of a world model: an average of its states would give other codes than the predictor learned."""
    plain, held = nn.Linear(1, 1), nn.Linear(1, 1)
    vars(held)["never_averaged"] = True
    model = nn.ModuleDict({"plain": plain, "held": held})
    average = WeightAverage(model, decay=0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(100.0)
    average.update(model, step=1000)
    average.copy_to(model)
    assert held.weight.item() == 100.0
    assert plain.weight.item() < 20
