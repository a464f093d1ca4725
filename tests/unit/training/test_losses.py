"""Losses: exactly zero at equality, and gradients that agree with finite differences."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmdeploy.tasks.bev_occupancy import BevOccupancy
from fmdeploy.training.losses import bernoulli_kl, feature_distance, kl_divergence, soft_dice, weighted_bce


def _logits(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 60))
@settings(max_examples=25, deadline=None)
def test_soft_losses_are_exactly_zero_when_the_student_equals_the_teacher(seed: int, scale: float) -> None:
    map_BCHW, row_BC = _logits(seed, 3, 5, 6, 6, scale=scale), _logits(seed, 3, 8, scale=scale)
    assert bernoulli_kl(map_BCHW, map_BCHW).item() == 0.0
    assert kl_divergence(row_BC, row_BC, temperature=2.0).item() == 0.0
    assert soft_dice(map_BCHW.sigmoid(), map_BCHW.sigmoid()).item() == 0.0
    assert feature_distance(map_BCHW, map_BCHW, axis=1).item() == 0.0


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_soft_losses_are_positive_when_they_differ(seed: int) -> None:
    ours, theirs = _logits(seed, 3, 5, 6, 6), _logits(seed + 1, 3, 5, 6, 6)
    assert bernoulli_kl(ours, theirs).item() > 0
    assert soft_dice(ours.sigmoid(), theirs.sigmoid()).item() > 0
    assert feature_distance(ours, theirs, axis=1).item() > 0
    assert kl_divergence(ours[:, :, 0, 0], theirs[:, :, 0, 0]).item() > 0


def test_bernoulli_kl_is_cross_entropy_minus_entropy() -> None:
    ours, theirs = _logits(0, 4, 5, 8, 8), _logits(1, 4, 5, 8, 8)
    p, q = theirs.double().sigmoid(), ours.double().sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(bernoulli_kl(ours, theirs).double(), expected, rtol=1e-5, atol=1e-7)


def test_bernoulli_kl_gradient_equals_finite_differences() -> None:
    ours, theirs = _logits(0, 2, 3).double().requires_grad_(), _logits(1, 2, 3).double()
    (gradient,) = torch.autograd.grad(bernoulli_kl(ours, theirs), ours)
    torch.testing.assert_close(gradient, (ours.sigmoid() - theirs.sigmoid()).detach() / 6, rtol=1e-5, atol=1e-7)


def test_kl_divergence_keeps_the_size_of_its_gradient_over_temperature() -> None:
    ours, theirs = _logits(0, 64, 10, scale=0.1), _logits(1, 64, 10, scale=0.1)
    norms = []
    for temperature in (1.0, 4.0):
        leaf = ours.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(kl_divergence(leaf, theirs, temperature=temperature), leaf)
        norms.append(gradient.norm().item())
    assert 0.9 < norms[0] / norms[1] < 1.1


def test_dice_gradient_equals_finite_differences() -> None:
    p = _logits(0, 2, 3, 4, 4).double().sigmoid().requires_grad_()
    t = (_logits(1, 2, 3, 4, 4) > 1).double()
    assert torch.autograd.gradcheck(lambda x: soft_dice(x, t), (p,), eps=1e-6, atol=1e-7)


def test_dice_is_over_the_batch_so_an_empty_sample_costs_nothing() -> None:
    labels = torch.zeros(2, 1, 4, 4)
    labels[0, 0, :2] = 1
    assert soft_dice(labels, labels).item() == 0.0


def test_weighted_bce_weighs_planes_and_occupied_cells() -> None:
    logits, labels = torch.zeros(1, 2, 1, 2), torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]])
    ln2 = 0.6931472
    found = weighted_bce(logits, labels, positive=(3.0, 1.0), weight=(0.25, 0.5))
    torch.testing.assert_close(found.item(), 0.25 * ln2 * (3 + 1) / 2 + 0.5 * ln2)


def test_the_task_loss_is_zero_only_against_an_equal_teacher() -> None:
    task = BevOccupancy()
    outputs = {"bev": _logits(0, 2, 5, 64, 64), "scene": _logits(1, 2, 8)}
    assert task.distillation_loss(outputs, outputs).item() == 0.0
    others = {"bev": outputs["bev"] + 0.1, "scene": outputs["scene"]}
    assert task.distillation_loss(outputs, others).item() > 0
