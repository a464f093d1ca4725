"""Every loss of distillation: zero at equality, above zero elsewhere, and the numbers of the papers' formulas by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fmdeploy.distill.ensemble import averaged
from fmdeploy.distill.losses.base import MapLoss, OutputLoss
from fmdeploy.distill.losses.registry import MAP_LOSSES, OUTPUT_LOSSES, make_loss, weights_of
from fmdeploy.distill.losses.whitened import whitening
from fmdeploy.distill.objective import weigh
from fmdeploy.distill.statistics import Statistics, measure
from fmdeploy.errors import ConfigError
from fmdeploy.task import load_task
from fmdeploy.tasks.image_classification import ImageClassification

TASK = load_task("bev-occupancy")


def _map(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _map_loss(name: str, **options: Any) -> MapLoss:
    loss = make_loss(name, options)
    assert isinstance(loss, MapLoss)
    return loss


def _output_loss(name: str, **options: Any) -> OutputLoss:
    loss = make_loss(name, options)
    assert isinstance(loss, OutputLoss)
    return loss


def _outputs(seed: int) -> dict[str, Tensor]:
    return {"bev": 3 * _map(2, 5, 8, 8, seed=seed), "scene": _map(2, 8, seed=seed + 1)}


@pytest.mark.parametrize("name", MAP_LOSSES)
def test_map_losses_vanish_at_equality_and_nowhere_else(name: str) -> None:
    loss, teacher, other = _map_loss(name), _map(3, 6, 4, 4), _map(3, 6, 4, 4, seed=1).requires_grad_()
    statistics = Statistics.of(teacher.numpy())
    assert loss(teacher, teacher.clone(), statistics).item() == 0.0
    value = loss(other, teacher, statistics)
    assert value.ndim == 0
    assert value.item() > 1e-4
    (gradient,) = torch.autograd.grad(value, other)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", OUTPUT_LOSSES)
def test_output_losses_vanish_at_equality_and_nowhere_else(name: str) -> None:
    loss, teacher = _output_loss(name), _outputs(0)
    assert loss(TASK, {k: v.clone() for k, v in teacher.items()}, teacher).item() == 0.0
    other = {k: v.requires_grad_() for k, v in _outputs(5).items()}
    value = loss(TASK, other, teacher)
    assert value.item() > 1e-4
    (gradient,) = torch.autograd.grad(value, other["bev"])
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", [name for name in MAP_LOSSES if not _map_loss(name).projected])
def test_losses_without_projector_take_any_number_of_channels(name: str) -> None:
    assert _map_loss(name)(_map(3, 4, 4, 4), _map(3, 10, 4, 4)).item() > 0


def test_kd_is_the_divergence_of_softened_probabilities_times_the_square_of_the_temperature() -> None:
    heat = 4.0
    ours, theirs = {"scene": torch.tensor([[1.0, 3.0, 0.0]])}, {"scene": torch.tensor([[2.0, 0.0, -1.0]])}
    q, p = ([math.exp(x / heat) for x in row] for row in ((1.0, 3.0, 0.0), (2.0, 0.0, -1.0)))
    q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
    expected = heat**2 * sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    found = _output_loss("kd", temperature=heat)(TASK, ours, theirs)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_kd_of_a_dense_output_is_one_bernoulli_variable_a_cell() -> None:
    ours, theirs = {"bev": torch.tensor([[[[0.4]]]])}, {"bev": torch.tensor([[[[-1.6]]]])}
    q, p = 1 / (1 + math.exp(-0.2)), 1 / (1 + math.exp(0.8))
    expected = 4 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    assert _output_loss("kd", temperature=2.0)(TASK, ours, theirs).item() == pytest.approx(expected, rel=1e-5)
    weighted = _output_loss("kd", temperature=2.0, weights={"bev": 0.25})(TASK, ours, theirs)
    assert weighted.item() == pytest.approx(expected / 4, rel=1e-5)


def test_cosine_is_one_minus_the_cosine() -> None:
    ours, theirs = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), torch.tensor([4.0, 3.0]).view(1, 2, 1, 1)
    assert _map_loss("cosine")(ours, theirs).item() == pytest.approx(1 - 24 / 25, rel=1e-5)


def test_whitened_is_one_for_a_student_that_answers_the_mean() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(4, 4)) * [1, 10, 0.1, 3]
    offset = np.array([5, -2, 0, 100])[None, :, None, None]
    teacher = np.einsum("dc,nchw->ndhw", mixing, rng.normal(size=(200, 4, 3, 3))) + offset
    statistics = Statistics.of(teacher)
    mean = torch.from_numpy(np.broadcast_to(statistics.mean_D[None, :, None, None], teacher.shape).copy())
    for how in ("channel", "phi-s", "zca"):
        loss = _map_loss("whitened", how=how, floor=1e-6)
        assert loss(mean, torch.from_numpy(teacher), statistics).item() == pytest.approx(1.0, rel=1e-4), how


def test_zca_leaves_the_features_uncorrelated() -> None:
    teacher = _map(64, 5, 2, 2).numpy()
    teacher[:, 1] += 2 * teacher[:, 0]
    statistics = Statistics.of(teacher)
    matrix = whitening(statistics, "zca", 1e-9)
    np.testing.assert_allclose(matrix @ statistics.covariance_DD @ matrix.T, np.eye(5), atol=1e-8)
    np.testing.assert_allclose(whitening(statistics, "channel", 1e-9) ** -2, np.diag(statistics.covariance_DD))


def test_statistics_are_those_of_the_samples_whatever_the_chunks() -> None:
    teacher = _map(1000, 3, 2, 2).numpy().astype(np.float16)
    seen: list[int] = []

    def answers(index: Any) -> dict[str, Any]:
        seen.extend(index.tolist())
        return {"feature.x": teacher[index]}

    found = measure(answers, ["feature.x"], len(teacher))["feature.x"]
    assert len(seen) == len(set(seen)) == 512
    assert (seen[0], seen[-1]) == (0, 999)
    rows = np.moveaxis(teacher[seen], 1, -1).reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(found.covariance_DD, np.cov(rows.T, bias=True), atol=1e-12)


def test_attention_compares_unit_maps_of_squares() -> None:
    ours, theirs = torch.tensor([[[[1.0, 0.0]], [[1.0, 2.0]]]]), torch.tensor([[[[3.0, 0.0]]]])  # squares 2:4, 9:0
    a, b = np.array([2.0, 4.0]) / math.sqrt(20), np.array([1.0, 0.0])
    assert _map_loss("attention")(ours, theirs).item() == pytest.approx(float(((a - b) ** 2).sum()), rel=1e-5)


def test_distance_compares_distances_over_their_mean() -> None:
    ours = torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1, 1)  # distances 1, 2, 3: mean 2
    theirs = torch.tensor([0.0, 10.0, 20.0]).view(3, 1, 1, 1)  # 10, 10, 20: mean 40/3
    differences = np.array([1 / 2 - 3 / 4, 2 / 2 - 3 / 4, 3 / 2 - 3 / 2])
    expected = 2 * float((0.5 * differences**2).sum()) / 9
    assert _map_loss("distance")(ours, theirs).item() == pytest.approx(expected, rel=1e-4)


def test_angle_compares_the_cosines_of_triplets() -> None:
    ours = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).view(3, 2, 1, 1)
    theirs = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]).view(3, 2, 1, 1)
    root = math.sqrt(0.5)  # corners: 90, 45, 45 degrees against 0, 180, 0
    each = [(0 - 1), (root + 1), (root - 1)]
    huber = sum(0.5 * d * d if abs(d) < 1 else abs(d) - 0.5 for d in each)
    assert _map_loss("angle")(ours, theirs).item() == pytest.approx(2 * huber / 27, rel=1e-4)


def test_relations_do_not_care_for_scale_and_place() -> None:
    teacher = _map(4, 3, 2, 2)
    for name in ("distance", "angle"):
        assert _map_loss(name)(7 * teacher + 3, teacher).item() < 1e-9


def test_similarity_compares_the_tokens_cosines() -> None:
    ours = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # two tokens at right angles
    theirs = torch.tensor([[[[1.0, 1.0]], [[0.0, 1.0]]]])  # at 45 degrees
    assert _map_loss("similarity")(ours, theirs).item() == pytest.approx(2 * 0.5 / 4, rel=1e-5)


def test_occupancy_counts_cells_near_vehicles_far_more_than_empty_ones() -> None:
    loss = _output_loss("occupancy", disagreement=0.0)
    teacher = torch.full((1, 1, 16, 16), -12.0)
    teacher[..., 4, 4] = 12.0
    near, far = teacher.clone(), teacher.clone()
    near[..., 4, 6] += 6.0  # as wrong as the other, two cells from the vehicle
    far[..., 12, 12] += 6.0
    ratio = loss(TASK, {"bev": near}, {"bev": teacher}) / loss(TASK, {"bev": far}, {"bev": teacher})
    assert ratio.item() == pytest.approx(1.02 / 0.02, rel=1e-3)


def test_occupancy_weighs_every_horizon_alike_however_sparse() -> None:
    loss = _output_loss("occupancy", near=0.0, boundary=0.0, disagreement=0.0)
    teacher, ours = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    ours[:, 0] = 1.0
    one = loss(TASK, {"bev": ours}, {"bev": teacher}).item()
    kl = 0.5 * math.log(0.5 / (1 / (1 + math.exp(-1)))) + 0.5 * math.log(0.5 / (1 / (1 + math.e)))
    assert one == pytest.approx(kl / 2, rel=1e-4)


def test_occupancy_looks_where_the_two_disagree() -> None:
    teacher, ours = torch.full((1, 1, 8, 8), -9.0), torch.full((1, 1, 8, 8), -9.0)
    ours[..., 2, 2] = 2.0
    plain, looking = (_output_loss("occupancy", disagreement=d)(TASK, {"bev": ours}, {"bev": teacher}).item()
                      for d in (0.0, 1.0))
    assert looking > 5 * plain


def test_several_teachers_are_averaged_in_probability() -> None:
    answers = [_outputs(0), _outputs(7)]
    found = averaged(TASK, answers, [0.25, 0.75])
    expected = 0.25 * torch.sigmoid(answers[0]["bev"]) + 0.75 * torch.sigmoid(answers[1]["bev"])
    torch.testing.assert_close(torch.sigmoid(found["bev"]), expected)
    expected = 0.25 * answers[0]["scene"].softmax(-1) + 0.75 * answers[1]["scene"].softmax(-1)
    torch.testing.assert_close(found["scene"].softmax(-1), expected)
    assert torch.equal(averaged(TASK, answers[:1], [1.0])["bev"], answers[0]["bev"])
    sure = [{"bev": torch.full((1, 5, 1, 1), s), "scene": torch.zeros(1, 8)} for s in (90.0, 110.0)]
    assert torch.isfinite(averaged(TASK, sure, [0.5, 0.5])["bev"]).all()


def test_learned_weights_start_as_given_and_settle_at_the_uncertainty() -> None:
    parts = {"a": torch.tensor(0.02), "b": torch.tensor(3.0)}
    s = torch.zeros(2, requires_grad=True)
    assert sum(value.item() for value in weigh(parts, s).values()) == pytest.approx(3.02)
    optimizer = torch.optim.SGD([s], lr=0.5)
    for _ in range(400):
        optimizer.zero_grad()
        (s.grad,) = torch.autograd.grad(torch.stack(list(weigh(parts, s).values())).sum(), s)
        optimizer.step()
    # The minimum of exp(-s) L + s / 2 is at exp(s) = 2 L: every part then counts one half.
    np.testing.assert_allclose(s.detach().exp().numpy(), [0.04, 6.0], rtol=1e-3)


@pytest.mark.parametrize(("wanted", "message"), [
    (("logits", "logits=2"), "given twice"), (("nothing",), "no such loss"), (("kd=0",), "no usable weight"),
    (("kd=nan",), "no usable weight"), (("kd=",), "no usable weight"),
])
def test_losses_that_cannot_be_are_refused(wanted: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        weights_of(wanted)


def test_options_of_a_loss_are_checked() -> None:
    with pytest.raises(ConfigError, match="loss kd.*temperature"):
        make_loss("kd", {"temperature": -1})
    with pytest.raises(ConfigError, match="unknown key 'heat'"):
        make_loss("kd", {"heat": 1})


def test_losses_that_do_not_suit_the_task_are_refused() -> None:
    class Pictures(ImageClassification):
        """Its only output is a vector."""

    with pytest.raises(ConfigError, match=r"loss occupancy: compares yes-or-no outputs.*logits \[10\]"):
        _output_loss("occupancy").check(Pictures())
    with pytest.raises(ConfigError, match=r"loss kd.weights: the task has no such output.*bve"):
        _output_loss("kd", weights={"bve": 2.0}).check(TASK)
    with pytest.raises(ConfigError, match="no output has weight"):
        _output_loss("kd", weights={"bev": 0.0, "scene": 0.0}).check(TASK)
    for name in OUTPUT_LOSSES:
        _output_loss(name).check(TASK)
