"""Masked reconstruction: what is hidden stays hidden, and only what is hidden is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fmdeploy.artifact import open_artifact
from fmdeploy.errors import ConfigError
from fmdeploy.models.saved import load_model
from fmdeploy.models.tokens import backbone_of
from fmdeploy.task import Task, load_task
from fmdeploy.teacher.objectives.mae import MaeConfig, MaskedReconstruction, in_order
from fmdeploy.teacher.objectives.predictor import Predictor, blanked, patches_of, places
from fmdeploy.teacher.objectives.prior import PlacePrior
from fmdeploy.teacher.train import train
from support.tokens_task import TokensTask
from support.training_data import TEACHER, write_scenes

SIZES = {key: TEACHER[key] for key in ("dim", "depth", "heads", "stem_width", "width")}
ALL = ("bev", "lidar", "camera")
SMALL: dict[str, Any] = {"width": 16, "heads": 2}


def _rngs(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng((3, place)) for place in range(count)]


def _bev(**options: Any) -> tuple[Task, nn.Module, MaskedReconstruction, dict[str, dict[str, Tensor]]]:
    """Task, teacher, objective and a batch of three random scenes with masks."""
    torch.manual_seed(0)
    task = load_task("bev-occupancy")
    teacher = task.teacher(SIZES)
    objective = MaskedReconstruction(task, teacher, MaeConfig(**SMALL, **options), steps=10)
    inputs = {spec.name: (torch.rand(3, *spec.shape) < 0.2).float() for spec in task.io.inputs}
    return task, teacher, objective, {"inputs": inputs, **_masks(objective, 3)}


def _masks(objective: MaskedReconstruction, count: int) -> dict[str, dict[str, Tensor]]:
    drawn = objective.arrays(None, np.arange(count), _rngs(count))  # type: ignore[arg-type]
    return {kind: {name: torch.from_numpy(value) for name, value in arrays.items()} for kind, arrays in drawn.items()}


def _with_noise(x_BCHW: Tensor, at_BN: Tensor) -> Tensor:
    """`x` with other zeros and ones in the patches where `at_BN` is true."""
    return blanked(x_BCHW, at_BN) + blanked((torch.rand_like(x_BCHW) < 0.5).float(), ~at_BN)


def _width(objective: MaskedReconstruction, name: str) -> int:
    head = objective.heads[name]
    assert isinstance(head, nn.Linear)
    return head.out_features


def test_by_default_every_sensor_is_masked() -> None:
    assert _bev()[2].counts == {"lidar": 29, "camera": 29}


def test_ways_of_hiding_never_meet() -> None:
    _, _, objective, batch = _bev(masked=ALL)
    assert objective.counts == {"bev": 13, "lidar": 23, "camera": 23}
    masks = batch["mae"]
    hidden = torch.cat([masks[name] for name in objective.counts], dim=1)
    assert all(len(set(row.tolist())) == hidden.shape[1] for row in hidden)
    for keep, dropped in zip(masks["keep"], masks["bev"], strict=True):
        assert sorted(keep.tolist() + dropped.tolist()) == list(range(64))


def test_visible_tokens_cannot_see_what_is_hidden() -> None:
    task, teacher, _objective, batch = _bev(masked=ALL, ratio=0.4)
    dropped_BN = places(batch["mae"]["bev"], 64)
    changed = {name: _with_noise(x, dropped_BN) for name, x in batch["inputs"].items()}
    backbone = backbone_of(teacher, where="test")

    def features(inputs: dict[str, Tensor]) -> Tensor:
        shown = [blanked(inputs[spec.name], dropped_BN) for spec in task.io.inputs]
        return backbone.tokens(*shown, keep_BK=batch["mae"]["keep"])

    assert any(not torch.equal(changed[name], batch["inputs"][name]) for name in changed)
    torch.testing.assert_close(features(changed), features(batch["inputs"]), rtol=0, atol=0)
    leaky = backbone.tokens(*changed.values(), keep_BK=batch["mae"]["keep"])  # without blanking the stem tells
    assert not torch.equal(leaky, backbone.tokens(*batch["inputs"].values(), keep_BK=batch["mae"]["keep"]))


@pytest.mark.parametrize("loss", ["mse", "bce", "patch"])
@pytest.mark.parametrize("masked", [("bev",), ("camera",), ("lidar", "bev"), ALL, ()])
def test_only_hidden_patches_are_judged(masked: tuple[str, ...], loss: str) -> None:
    """The gradient of the loss with respect to what is wanted is zero outside the hidden patches."""
    _, teacher, objective, batch = _bev(masked=masked, loss=loss)
    asked: dict[str, Tensor] = {}
    for name, x in batch["inputs"].items():
        asked[name] = x.clone()
    losses = objective.losses(teacher, {**batch, "inputs": asked})
    assert set(losses) == ({"lidar", "camera"} if not masked or "bev" in masked else set(masked))
    for name in losses:
        hidden_BN = places(objective._hidden(name, batch["mae"]), 64)
        predicted = torch.zeros(3, int(hidden_BN[0].sum()), _width(objective, name))
        patches = patches_of(asked[name], 8).clone().requires_grad_(True)
        objective._distance(name, predicted, patches, objective._hidden(name, batch["mae"])).backward()  # type: ignore[no-untyped-call]
        assert patches.grad is not None
        moved_BN = patches.grad.abs().sum(2) > 0
        assert not bool((moved_BN & ~hidden_BN).any())
        assert bool(moved_BN.any())


def test_a_masked_camera_leaves_the_lidar_visible() -> None:
    _, teacher, objective, batch = _bev(masked=("camera",), sensor_ratio=0.5)
    hidden_BN = places(batch["mae"]["camera"], 64)

    def reconstruction(inputs: dict[str, Tensor]) -> Tensor:
        seen: list[Tensor] = []
        handle = objective.heads["camera"].register_forward_hook(lambda _m, _i, output: seen.append(output))
        objective.losses(teacher, {**batch, "inputs": inputs})
        handle.remove()
        return seen[0]

    first = reconstruction(batch["inputs"])
    other_camera = {**batch["inputs"], "camera": _with_noise(batch["inputs"]["camera"], hidden_BN)}
    other_lidar = {**batch["inputs"], "lidar": _with_noise(batch["inputs"]["lidar"], hidden_BN)}
    torch.testing.assert_close(reconstruction(other_camera), first, rtol=0, atol=0)
    assert (reconstruction(other_lidar) - first).abs().max() > 1e-4


def test_saying_the_average_costs_one_and_the_truth_nothing() -> None:
    torch.manual_seed(0)
    x_BNCQ = (torch.rand(4000, 4, 2, 3) < torch.rand(4, 2, 3)).float()
    prior = PlacePrior(4, 2, 3)
    prior.see(x_BNCQ)
    places_BM = torch.arange(4).expand(4000, 4)
    nothing = torch.zeros_like(x_BNCQ)
    assert float(prior.squared(nothing, x_BNCQ, places_BM)) == pytest.approx(1, abs=0.02)
    assert float(prior.entropy(nothing, x_BNCQ, places_BM, 1.0)) == pytest.approx(1, abs=0.02)
    truth = (x_BNCQ - prior.mean_NCQ) / prior.variance_C.sqrt()[:, None]
    assert float(prior.squared(truth, x_BNCQ, places_BM)) == pytest.approx(0, abs=1e-9)
    assert float(prior.entropy(40 * (2 * x_BNCQ - 1), x_BNCQ, places_BM, 1.0)) == pytest.approx(0, abs=1e-6)


def test_the_prior_is_the_mean_of_the_first_batches() -> None:
    x = torch.rand(3, 5, 4, 2, 3)
    prior = PlacePrior(4, 2, 3)
    for batch in x:
        prior.see(batch)
    torch.testing.assert_close(prior.mean_NCQ, x.mean((0, 1)))


def test_the_decoder_knows_places_and_nothing_else_of_hidden_tokens() -> None:
    torch.manual_seed(0)
    decoder = Predictor(8, 4, width=16, depth=1, heads=2)
    state, seen, asked = torch.randn(2, 6, 8), torch.tensor([[0, 3, 5, 7, 9]] * 2), torch.tensor([[1, 2], [2, 1]])
    filled = decoder(state[:1].expand(2, -1, -1), seen, asked)
    torch.testing.assert_close(filled[0, 5:], filled[1, 5:].flip(0))  # the order of the questions does not matter
    assert not torch.allclose(filled[0, 5], filled[0, 6])


def test_rows_come_back_in_the_order_of_their_places() -> None:
    places_BN = torch.tensor([[2, 0, 1], [1, 2, 0]])
    rows = places_BN[..., None].float()
    assert in_order(rows, places_BN)[..., 0].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_float_images_are_reconstructed_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = TokensTask()
    teacher = task.teacher({})
    objective = MaskedReconstruction(task, teacher, MaeConfig(**SMALL), steps=200)
    assert objective.counts == {"bev": 10}
    assert objective.loss_of("image") == "patch"
    ramp = torch.linspace(-1, 1, 16)
    image = ramp[None, :, None] * torch.randn(8, 3, 1, 1) + ramp[None, None] * torch.randn(8, 3, 1, 1)
    optimizer = torch.optim.Adam([*teacher.parameters(), *objective.parameters()], lr=3e-3)
    found = []
    for _ in range(150):
        loss = objective.losses(teacher, {"inputs": {"image": image}, **_masks(objective, 8)})["image"]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append(float(loss.detach()))
    assert np.mean(found[-5:]) < 0.5 * found[0]


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_a_camera_that_sees_what_the_lidar_sees_is_learned_from_it(loss: str) -> None:
    _, teacher, objective, batch = _bev(masked=("camera",), loss=loss)
    hits = batch["inputs"]["lidar"][:, :1]
    batch["inputs"] = {"lidar": hits.expand(-1, 8, -1, -1), "camera": hits.expand(-1, 12, -1, -1)}
    optimizer = torch.optim.Adam([*teacher.parameters(), *objective.parameters()], lr=3e-3)
    found = []
    for _ in range(120):
        value = objective.losses(teacher, batch)["camera"]
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append(float(value.detach()))
    assert found[0] == pytest.approx(1, abs=0.5)
    assert found[-1] < 0.6 * found[0]


def test_what_cannot_be_masked_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot mask 'radar'.*bev, lidar, camera"):
        _bev(masked=("radar",))
    with pytest.raises(ConfigError, match=r"bce needs values between 0 and 1 of input 'image'"):
        MaskedReconstruction(TokensTask(), TokensTask().teacher({}), MaeConfig(**SMALL, loss="bce"), steps=1)
    with pytest.raises(ConfigError, match="hides every token"):
        _bev(masked=ALL, ratio=0.5, sensor_ratio=0.99)


def test_it_trains_on_the_command_line_and_the_teacher_can_be_tuned(tmp_path: Path) -> None:
    write_scenes(tmp_path / "data")
    options = {**TEACHER, "data": tmp_path / "data"}
    pretrained = train(out=tmp_path / "mae", objective=("mae",), set=("mae.width=16", "mae.heads=2"), steps=8, **options)
    metrics = pretrained.json("metrics.json")
    assert metrics["objective"] == {"mae": 1.0}
    assert "test" not in metrics
    assert "labels" not in metrics
    assert load_model(pretrained).recipe.heads is False
    log = [json.loads(line) for line in pretrained.path("log.jsonl").read_text().splitlines()]
    assert {"lidar", "camera"} < set(log[0])
    assert all(np.isfinite(r["loss"]) for r in log)
    sizes = {key: value for key, value in options.items() if key not in SIZES}
    tuned = train(out=tmp_path / "tuned", init=tmp_path / "mae", labels=0.25, steps=2, **sizes)
    assert tuned.json("metrics.json")["labels"]["fraction"] < 0.5
    before, after = (open_artifact(tmp_path / name).tensors("model.safetensors") for name in ("mae", "tuned"))
    drift = {key: float(np.abs(before[key] - after[key]).max()) for key in before}
    assert all(value < 0.01 for key, value in drift.items() if key.startswith("backbone."))
