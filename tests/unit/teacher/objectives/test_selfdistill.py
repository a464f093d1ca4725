"""Self-distillation: balanced targets, the least loss, and views on an ego grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fmdeploy.data.format import open_dataset
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.models.tokens import TokenBackbone, backbone_of
from fmdeploy.task import Samples, load_task
from fmdeploy.teacher.objectives.base import CollapsedError
from fmdeploy.teacher.objectives.crops import GLOBAL, STILL, WHOLE, ViewConfig, Views, draw_views, moved
from fmdeploy.teacher.objectives.dense_targets import cell_targets
from fmdeploy.teacher.objectives.predictor import patches_of
from fmdeploy.teacher.objectives.selfdistill import SelfDistillation, SelfDistillationConfig
from fmdeploy.teacher.objectives.selfdistill_average import MovingCopy, rising
from fmdeploy.teacher.objectives.selfdistill_cells import CellHead
from fmdeploy.teacher.objectives.selfdistill_targets import Centre, Remembered, cross_entropy, sinkhorn
from fmdeploy.teacher.train import train
from support.training_data import TEACHER, write_scenes

SIZES = {key: TEACHER[key] for key in ("dim", "depth", "heads", "stem_width", "width")}
SMALL = {"prototypes": 8, "token_prototypes": 8, "memory": 16, "hidden_width": 16, "bottleneck": 8}
UNMOVED = {"shift": 0.0, "zoom": 0.0, "turn": 0.0, "sensor_drop": 0.0, "cells_lost": 0.0, "hidden": 0.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`."""
    folder = tmp_path_factory.mktemp("selfdistill")
    write_scenes(folder / "data")
    return folder


def _rngs(count: int, first: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng((5, place)) for place in range(first, first + count)]


def _scores(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _drawn(config: ViewConfig, count: int, *, side: int = 4, patch: int = 4) -> dict[str, Tensor]:
    drawn = draw_views(config, _rngs(count), num_inputs=2, side=side, patch=patch)
    return {name: torch.from_numpy(value) for name, value in drawn.items()}


def _batch(objective: SelfDistillation, samples: Samples, count: int) -> dict[str, dict[str, Tensor]]:
    index = np.arange(count)
    arrays = {"inputs": samples.batch(index)[0], **objective.arrays(samples, index, _rngs(count))}
    return {kind: {name: torch.from_numpy(x) for name, x in values.items()} for kind, values in arrays.items()}


def test_sinkhorn_gives_every_row_one_and_every_prototype_its_share() -> None:
    scores = _scores(48, 6)
    scores[:, 2] += 3  # a favourite
    found = sinkhorn(scores, 0.5, rounds=60)
    torch.testing.assert_close(found.sum(1), torch.ones(48))
    torch.testing.assert_close(found.sum(0), torch.full((6,), 8.0), rtol=1e-3, atol=0)
    quick = sinkhorn(scores, 0.5)
    torch.testing.assert_close(quick.sum(1), torch.ones(48))
    assert torch.softmax(scores / 0.5, 1).sum(0)[2] > 40  # of 48: what it has to mend
    assert (quick.sum(0) - 8).abs().max() < 2.5
    torch.testing.assert_close(sinkhorn(torch.zeros(5, 4), 0.1), torch.full((5, 4), 0.25))


def test_few_rows_are_balanced_with_those_of_former_steps() -> None:
    balance, scores = Remembered(4, 6), _scores(2, 4)
    torch.testing.assert_close(torch.cat(balance([scores[:1], scores[1:]], 0.5)), sinkhorn(scores, 0.5))
    balance.follow()
    (later,) = balance([_scores(3, 4, seed=1)], 0.5)
    both = torch.cat((_scores(3, 4, seed=1), scores))
    torch.testing.assert_close(later, sinkhorn(both, 0.5)[:3])
    for step in range(2):
        balance.follow()
        balance([_scores(3, 4, seed=step)], 0.5)
    balance.follow()
    assert sorted(balance.past.keys_SQP[0, :, 0].tolist()) == sorted(  # the last six rows of eleven
        torch.cat((_scores(3, 4, seed=0), _scores(3, 4, seed=1)))[:, 0].tolist())


def test_centring_stops_one_prototype_from_taking_everything() -> None:
    centre = Centre(6, keep=0.5)
    scores = 0.1 * _scores(64, 6)
    scores[:, 3] += 1
    first = centre(scores, 0.05)
    assert (first.argmax(1) == 3).all()
    for _ in range(20):
        centre.follow()
        last = centre(scores, 0.05)
    counts = torch.bincount(last.argmax(1), minlength=6)
    assert counts.max() < 32
    assert (counts > 0).all()
    torch.testing.assert_close(centre.mean_K, scores.mean(0), rtol=1e-3, atol=1e-4)
    centre.eval()
    centre(scores + 9, 0.05)
    centre.follow()
    assert centre.mean_K.max() < 2


@torch.no_grad()
def test_equal_views_give_the_least_loss(home: Path) -> None:
    """With one temperature and nothing degraded the answer is the target, and the loss its entropy."""
    torch.manual_seed(0)
    task = load_task("bev-occupancy")
    teacher = task.teacher(SIZES)
    config = SelfDistillationConfig(**SMALL, **UNMOVED, local_views=0, balance="centre", patches=0, frames=1, cells=0,  # type: ignore[arg-type]
                                    frame_temperature=0.1, student_temperature=0.1)
    objective = SelfDistillation(task, teacher, config, steps=5)
    samples = task.samples(open_dataset(home / "data"), "train")
    batch = _batch(objective, samples, 4)
    state = backbone_of(teacher, where="test").tokens(batch["inputs"]["lidar"], batch["inputs"]["camera"])
    state = state - state.mean(0)
    target = torch.softmax(objective.heads.frame(state[:, 0]) / 0.1, dim=-1)
    least = float(-(target * target.log()).sum(-1).mean())
    assert float(objective.losses(teacher, batch)["frame"]) == pytest.approx(least, rel=1e-4)
    other = cross_entropy(target, objective.heads.frame(state[:, 0]) + 0.1 * _scores(4, 8), 0.1).mean()
    assert float(other) > least
    with torch.no_grad():
        for parameter in objective.heads.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    assert float(objective.losses(teacher, batch)["frame"]) > least


def _loud(backbone: TokenBackbone) -> Callable[..., Tensor]:
    """Its tokens, which say of every place where it is, louder than what is there."""
    inner, place_ND = backbone.tokens, 5 * _scores(backbone.side**2 + 1, backbone.dim)
    return lambda *inputs: inner(*inputs) + place_ND


@torch.no_grad()
def test_prototypes_are_of_what_is_at_a_place_not_of_the_place(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    task = load_task("bev-occupancy")
    teacher = task.teacher(SIZES)
    objective = SelfDistillation(task, teacher, SelfDistillationConfig(**SMALL, local_views=0), steps=5)  # type: ignore[arg-type]
    samples = task.samples(open_dataset(home / "data"), "train")
    batch = _batch(objective, samples, 4)
    objective.eval()
    first = objective.losses(teacher, batch)
    for backbone in (backbone_of(teacher, where="test"), objective.target.module):
        assert isinstance(backbone, TokenBackbone)
        loud = _loud(backbone)
        for name in ("tokens", "forward"):
            monkeypatch.setattr(backbone, name, loud)
    second = objective.losses(teacher, batch)
    for part in ("frame", "token"):
        assert float(second[part]) == pytest.approx(float(first[part]), rel=1e-3)


class Plain(TokenBackbone):
    """Tokens that are the patches of one input, and a finest map that is the input."""

    side, patch, dim = 4, 4, 16

    def tokens(self, *inputs: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Class token zero, then the cells of each patch row by row."""
        patch_BND = patches_of(inputs[0], self.side)
        return torch.cat((torch.zeros_like(patch_BND[:, :1]), patch_BND), dim=1)

    def finest(self, *inputs: Tensor) -> Tensor:
        """The input."""
        return inputs[0]

    @property
    def finest_size(self) -> tuple[int, int]:
        """One channel of 16 x 16 cells."""
        return 1, 16


class OneInput:
    """A task of one input, as far as targets ask."""

    io = IOSpec(inputs=(TensorSpec(name="x", shape=(1, 16, 16), layout="CHW"),),
                outputs=(TensorSpec(name="y", shape=(2,), layout="C"),), preprocessing="none")


def test_a_token_is_asked_for_its_own_cells_now_and_later() -> None:
    """One layer can answer exactly where the average's features are in the token, and then nothing is left."""
    backbone, grid = Plain(), torch.randn(6, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    head = CellHead(backbone, 2)
    wanted = cell_targets(OneInput(), backbone, {"x": grid}, ahead=2)  # type: ignore[arg-type]
    assert wanted.shape == (6, 2, 16, 1, 16)
    torch.testing.assert_close(wanted.square().mean(), torch.tensor(1.0))
    state = backbone.tokens(grid[:, 1:])[:, 1:]
    assert not head(state).any()
    with torch.no_grad():
        head.read.weight[16:].copy_(torch.eye(16))  # of the second frame, which is the one that is seen
    told = head(state)
    assert not told[:, 0].any()
    centred = told[:, 1] - told[:, 1].mean(0)
    torch.testing.assert_close(centred / centred.square().mean().sqrt(),
                               wanted[:, 1] / wanted[:, 1].square().mean().sqrt())


@torch.no_grad()
def test_cells_are_asked_of_the_view_that_stands_still(home: Path) -> None:
    """What is moved in the other views, or hidden in them, is nothing to this part; it starts at all the variance."""
    torch.manual_seed(0)
    task = load_task("bev-occupancy")
    teacher = task.teacher(SIZES)
    objective = SelfDistillation(task, teacher, SelfDistillationConfig(**SMALL), steps=5)  # type: ignore[arg-type]
    batch = _batch(objective, task.samples(open_dataset(home / "data"), "train"), 4)
    assert objective.heads.cell is not None
    first = objective.losses(teacher, batch)["cell"]
    assert float(first) == pytest.approx(1.0, abs=0.01)
    nn.init.normal_(objective.heads.cell.read.weight, std=0.1)
    second = objective.losses(teacher, batch)["cell"]
    assert float(second) > 1.01
    for view in range(1, GLOBAL):
        batch["selfdistill"]["affine"][:, view] = 0.3 * batch["selfdistill"]["affine"][:, view]
        batch["selfdistill"]["hidden"][:, view] = True
    assert float(objective.losses(teacher, batch)["cell"]) == pytest.approx(float(second), rel=1e-5)
    batch["selfdistill"]["hidden"][:, STILL] = True
    assert float(objective.losses(teacher, batch)["cell"]) != pytest.approx(float(second), rel=1e-3)
    batch["selfdistill.ahead"]["lidar"][:] = batch["selfdistill.ahead"]["lidar"].roll(1, 0)
    assert float(objective.losses(teacher, batch)["cell"]) != pytest.approx(float(second), rel=1e-3)


@pytest.mark.parametrize("ahead", [(), (-1,), (9,), (2, 2)])
def test_frames_that_no_sample_has_are_refused(ahead: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="ahead"):
        SelfDistillationConfig(ahead=ahead)


def test_views_move_whole_cells_and_stay_binary() -> None:
    grid = torch.zeros(1, 1, 16, 16)
    grid[0, 0, 5, 9] = 1
    assert torch.equal(moved(grid, torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])), grid)
    shifted = moved(grid, torch.tensor([[[1.0, 0, 2 * 3 / 16], [0, 1, -2 * 2 / 16]]]))
    assert shifted.nonzero().tolist() == [[0, 0, 7, 6]]
    noise = (_scores(64, 64)[None, None] > 1).float()
    drawn = _drawn(ViewConfig(turn=20.0), 1, side=8, patch=8)
    assert torch.equal(moved(noise, drawn["affine"][:, STILL]), noise)
    for view in range(1, drawn["affine"].shape[1]):
        assert not torch.equal(moved(noise, drawn["affine"][:, view]), noise)
        turned = moved(noise, drawn["affine"][:, view])
        assert set(turned.flatten().tolist()) == {0.0, 1.0}
        assert 0.3 < float(turned.mean() / noise.mean()) < 1.5


def test_the_student_sees_less_than_the_teacher() -> None:
    config = ViewConfig.model_validate({**UNMOVED, "sensor_drop": 0.5, "hidden": 0.25, "local_views": 3, "window": 2})
    drawn = _drawn(config, 16)
    inputs = [torch.rand(16, channels, 16, 16) * 0.4 + 0.01 for channels in (2, 3)]
    views = Views(inputs, drawn, patch=4)
    for given, seen in zip(inputs, views.teacher(), strict=True):
        torch.testing.assert_close(seen, torch.cat((given, given)))
    assert (drawn["hidden"].sum(-1) == 4).all()
    missing = drawn["missing"][:, :GLOBAL].T.flatten()
    assert set(missing.tolist()) == {WHOLE, 0, 1}
    for number, seen in enumerate(views.student()):
        assert ((seen == 0).float().mean((1, 2, 3)) == torch.where(missing == number, 1.0, 0.25)).all()
    found = views.local()
    assert found is not None
    (lidar, _), window = found
    assert window.shape == (48, 4)
    alive = torch.nn.functional.max_pool2d(lidar[:, :1], 4).flatten(1) > 0
    for row, (cells, tokens) in enumerate(zip(alive, window, strict=True)):
        if drawn["missing"][:, GLOBAL:].T.flatten()[row] != 0:
            assert cells.nonzero().flatten().tolist() == sorted(tokens.tolist())


def test_views_of_a_sample_do_not_depend_on_its_neighbours() -> None:
    config = ViewConfig()
    whole = draw_views(config, _rngs(5), num_inputs=2, side=8, patch=8)
    part = draw_views(config, _rngs(2, first=3), num_inputs=2, side=8, patch=8)
    for name, value in part.items():
        assert (value == whole[name][3:]).all()
    lost = draw_views(ViewConfig(cells_lost=0.4), _rngs(200), num_inputs=1, side=8, patch=8)
    assert lost["lost"].mean() == pytest.approx(0.2, abs=0.02)
    assert (lost["missing"] == WHOLE).all()  # a task with one input cannot lose it


def test_the_average_follows_and_is_never_trained() -> None:
    source = torch.nn.BatchNorm2d(2)
    copy = MovingCopy(source)
    with torch.no_grad():
        source.weight.fill_(3)
        source.get_buffer("num_batches_tracked").fill_(7)
    copy.follow(source, 0.75)
    assert copy.module.get_parameter("weight").tolist() == [1.5, 1.5]
    assert int(copy.module.get_buffer("num_batches_tracked")) == 7
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert not copy.train().module.training
    assert [rising(0.9, 1.0, step, 11) for step in (0, 5, 10)] == pytest.approx([0.9, 0.95, 1.0])


def test_a_collapse_stops_the_run(home: Path) -> None:
    with pytest.raises(CollapsedError, match="has collapsed at step 1"):
        train(data=home / "data", out=home / "collapsed", steps=12, objective=("selfdistill",), **TEACHER,
              set=("selfdistill.min_std=0.999", "selfdistill.watch_every=1", "selfdistill.patience=2"))
