"""JEPA: what it hides and predicts, how its target moves, and that a collapse is caught (and a healthy run is not)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fmdeploy.errors import ConfigError
from fmdeploy.models.tokens import backbone_of
from fmdeploy.task import load_task
from fmdeploy.teacher.objectives.base import CollapsedError
from fmdeploy.teacher.objectives.dense_targets import evened, standardised
from fmdeploy.teacher.objectives.jepa import Jepa, JepaConfig
from fmdeploy.teacher.objectives.predictor import blanked, places
from fmdeploy.teacher.objectives.selfdistill_average import MovingCopy
from fmdeploy.teacher.train import train
from fmdeploy.training.ema import WeightAverage
from support.training_data import TEACHER, write_scenes

SIZES = {key: TEACHER[key] for key in ("dim", "depth", "heads", "stem_width", "width")}
SMALL: dict[str, Any] = {"width": 16, "heads": 2, "depth": 1}


class Clip:
    """Samples of random frames -3 .. 8; the planes of a frame are those of lidar and camera."""

    planes_BTKHW = np.random.default_rng(0).random((4, 12, 5, 64, 64)) < np.array([0.1, 0.4, 0.02, 0.3, 0.1])[:, None, None]

    def frames(self, index: Any, offsets: Any) -> Any:
        """See `BevSamples.frames`."""
        return self.planes_BTKHW[index][:, [3 + k for k in offsets]].astype(np.uint8)

    def inputs(self, ahead: int = 0) -> dict[str, Tensor]:
        """What the sensors see, oldest frame first."""
        stack = torch.from_numpy(self.planes_BTKHW[:, ahead : ahead + 4]).float()
        return {"lidar": stack[:, :, :2].flatten(1, 2), "camera": stack[:, :, 2:].flatten(1, 2)}


def _jepa(steps: int = 10, **options: Any) -> tuple[nn.Module, Jepa, dict[str, dict[str, Tensor]]]:
    """Teacher, objective and a batch of four random scenes."""
    torch.manual_seed(0)
    task = load_task("bev-occupancy")
    teacher = task.teacher(SIZES)
    objective = Jepa(task, teacher, JepaConfig(**{**SMALL, **options}), steps=steps)
    rngs = [np.random.default_rng((3, place)) for place in range(4)]
    drawn = objective.arrays(Clip(), np.arange(4), rngs)  # type: ignore[arg-type]
    masks = {kind: {name: torch.from_numpy(value) for name, value in arrays.items()} for kind, arrays in drawn.items()}
    return teacher, objective, {"inputs": Clip().inputs(), **masks}


def test_the_targets_are_the_features_now_and_later() -> None:
    _, objective, batch = _jepa(ahead=(1, 6))
    for place, ahead in enumerate((1, 6)):
        for name, wanted in Clip().inputs(ahead).items():
            found = batch["jepa.ahead"][name].reshape(4, 2, *wanted.shape[1:])[:, place].float()
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    found_BANCQ = objective._targets(batch)
    assert found_BANCQ.shape == (4, 2, 64, SIZES["stem_width"], 16)
    _, alone, present = _jepa(ahead=(0,))
    assert "jepa.ahead" not in present
    assert alone._targets(present).shape == (4, 1, 64, SIZES["stem_width"], 16)


@pytest.mark.parametrize("name", ["bev-occupancy", "image-classification"])
def test_the_finest_map_has_the_size_that_is_said(name: str) -> None:
    task = load_task(name)
    teacher = task.teacher({key: SIZES[key] for key in ("dim", "depth", "heads")})
    backbone = backbone_of(teacher, where="")
    found = backbone.finest(*(torch.zeros(1, *spec.shape) for spec in task.io.inputs))
    channels, side = backbone.finest_size
    assert found.shape == (1, channels, side, side)
    assert side % backbone.side == 0


def test_an_answer_that_is_right_has_no_loss_and_the_target_gets_no_gradient() -> None:
    teacher, objective, batch = _jepa()
    loss = objective.losses(teacher, batch)["predict"]
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(1, abs=1e-3)  # a share of the variance
    assert all(p.grad is None for p in objective.target.parameters())
    trained = [*backbone_of(teacher, where="").parameters(), *objective.predictor.parameters()]
    assert all(p.grad is not None for p in trained if p.requires_grad)
    truth = objective._targets(batch)
    objective._predicted = lambda state_BND: truth  # type: ignore[method-assign]
    assert float(objective.losses(teacher, batch)["predict"]) == 0


def test_a_block_is_hidden_from_its_sensor_and_the_target_sees_it() -> None:
    teacher, objective, batch = _jepa(blocks=1, share=0.2)
    batch["jepa"]["hidden"] = torch.tensor([[0], [1], [2], [2]])  # lidar, camera, both, both
    seen: list[tuple[Tensor, ...]] = []
    backbone_of(teacher, where="").tokens = lambda *x: seen.append(x) or torch.zeros(4, 65, 16)  # type: ignore[method-assign, func-returns-value]
    objective.losses(teacher, batch)
    for number, name in enumerate(("lidar", "camera")):
        gone_BN = places(batch["jepa"]["blocks"][:, 0], 64) & torch.tensor([number == 0, number == 1, True, True])[:, None]
        torch.testing.assert_close(seen[0][number], blanked(batch["inputs"][name], gone_BN), rtol=0, atol=0)
        assert (seen[0][number] != batch["inputs"][name]).any()
    before = objective._targets(batch)
    batch["jepa"]["blocks"] = batch["jepa"]["blocks"].flip(0)
    torch.testing.assert_close(objective._targets(batch), before, rtol=0, atol=0)


def test_blocks_are_hidden_from_each_sensor_and_from_all() -> None:
    _, objective, _ = _jepa(blocks=8)
    drawn = objective.arrays(Clip(), np.arange(4), [np.random.default_rng(k) for k in range(4)])  # type: ignore[arg-type]
    assert set(drawn["jepa"]["hidden"].ravel()) == {0, 1, 2}


def test_a_rare_channel_weighs_as_much_as_a_common_one() -> None:
    rare, common = torch.rand(16, 1, 32, 32) < 0.01, torch.rand(16, 1, 32, 32) < 0.5
    found = evened(torch.cat((rare, common, torch.zeros_like(rare)), dim=1).float())
    torch.testing.assert_close(found.std((0, 2, 3)), torch.tensor([1.0, 1.0, 0.0]), rtol=1e-2, atol=1e-6)


def test_the_targets_are_centred_on_their_place_and_of_unit_variance_in_each_channel() -> None:
    features_BANCQ = torch.tensor([1.0, 30.0])[:, None] * torch.randn(64, 2, 4, 2, 3) + 50 * torch.randn(2, 4, 2, 3)
    found = standardised(features_BANCQ)
    torch.testing.assert_close(found.mean(0), torch.zeros(2, 4, 2, 3), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.square().mean((0, 1, 2, 4)), torch.ones(2), rtol=1e-3, atol=1e-3)
    assert torch.isfinite(standardised(features_BANCQ[:1])).all()


def test_samples_without_other_frames_are_refused_with_the_way_out() -> None:
    _, objective, _ = _jepa()
    with pytest.raises(ConfigError, match=r"needs the frames.*Set jepa\.ahead=\[0\]"):
        objective.arrays(object(), np.arange(1), [np.random.default_rng(0)])  # type: ignore[arg-type]

    class Wider(Clip):
        planes_BTKHW = np.zeros((4, 12, 6, 64, 64), bool)

    with pytest.raises(ConfigError, match=r"do not make up the inputs.*found.*6"):
        objective.arrays(Wider(), np.arange(1), [np.random.default_rng(0)])  # type: ignore[arg-type]


@pytest.mark.parametrize("ahead", [(), (-1,), (9,), (2, 2)])
def test_frames_that_no_sample_has_are_refused(ahead: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="ahead"):
        JepaConfig(ahead=ahead)


@pytest.mark.parametrize(("decay", "final"), [(0.9, 1.0), (0.5, 0.5)])
def test_the_target_moves_as_scheduled(decay: float, final: float) -> None:
    teacher, objective, _ = _jepa(steps=5, decay=decay, final_decay=final)
    assert [objective.decay_at(step) for step in (0, 2, 4)] == pytest.approx([decay, (decay + final) / 2, final])
    backbone = backbone_of(teacher, where="")
    before = [p.clone() for p in objective.target.parameters()]
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1)
    objective.after_step(teacher, 0)
    for old, new, source in zip(before, objective.target.parameters(), backbone.parameters(), strict=True):
        torch.testing.assert_close(new, decay * old + (1 - decay) * source)


def test_every_moving_average_is_the_same_arithmetic() -> None:
    """Targets of JEPA and of self-distillation and the averaged weights of a run: the same bits."""
    teacher, objective, _ = _jepa(steps=5, decay=0.9, final_decay=0.9)
    backbone = backbone_of(teacher, where="")
    copy, average = MovingCopy(backbone), WeightAverage(backbone, decay=0.9)
    before = [p.clone() for p in backbone.parameters()]
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter))
    objective.after_step(teacher, 0)
    copy.follow(backbone, 0.9)
    average.update(backbone, step=1000)
    for number, (name, source) in enumerate(backbone.named_parameters()):
        wanted = torch.lerp(before[number], source.detach(), 1 - 0.9)
        for found in (objective.target.get_parameter(name), copy.module.get_parameter(name), average.values[name]):
            assert torch.equal(found, wanted), name


def test_the_target_is_part_of_the_checkpoint_and_not_of_what_is_trained() -> None:
    _, objective, _ = _jepa()
    saved = objective.state_dict()
    assert any(name.startswith("target.") for name in saved)
    assert "monitor.strikes" in saved
    assert not any(p.requires_grad for p in objective.target.parameters())


def test_the_target_is_in_evaluation_mode_while_the_backbone_trains() -> None:
    _, objective, _ = _jepa()
    objective.train()
    assert objective.predictor.training
    assert not any(module.training for module in objective.target.modules())


def _step(teacher: nn.Module, objective: Jepa, batch: dict[str, dict[str, Tensor]], optimizer: Any, step: int) -> Any:
    loss = objective.losses(teacher, batch)["predict"]
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return objective.after_step(teacher, step)


def _steps(teacher: nn.Module, objective: Jepa, batch: dict[str, dict[str, Tensor]], optimizer: Any) -> None:
    for step in range(1, 400):
        _step(teacher, objective, batch, optimizer, step)


def test_a_planted_collapse_is_caught() -> None:
    """Target = backbone at every step, no predictor, raw features to match: one answer for all inputs is the optimum."""
    teacher, objective, batch = _jepa(steps=400, decay=0.0, final_decay=0.0, watch_every=5)
    backbone = backbone_of(teacher, where="")

    def agree(_teacher: nn.Module, batch: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        inputs = batch["inputs"]
        part = backbone.tokens(*(blanked(x, places(batch["jepa"]["blocks"][:, 0], 64)) for x in inputs.values()))[:, 1:]
        whole = objective.target.tokens(*inputs.values())[:, 1:].detach()
        objective.monitor.see(whole)
        return {"predict": nn.functional.mse_loss(part, whole) + whole.new_zeros(())}

    objective.losses = agree  # type: ignore[method-assign, assignment]
    optimizer = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=1e-2)
    healthy = float(_step(teacher, objective, batch, optimizer, 0)["feature_std"])
    assert healthy > 0.1
    with pytest.raises(CollapsedError, match=r"collapsed at step \d+.*--set jepa\.decay=0\.999"):
        _steps(teacher, objective, batch, optimizer)
    assert int(objective.monitor.strikes) == 3


def test_a_healthy_run_is_not_stopped_and_logs_what_it_watches(tmp_path: Path) -> None:
    write_scenes(tmp_path / "data")
    settings = tuple(f"jepa.{key}={value}" for key, value in {**SMALL, "watch_every": 5, "patience": 1}.items())
    artifact = train(data=tmp_path / "data", out=tmp_path / "t", objective=("jepa",), set=settings, steps=60, **TEACHER)
    log = [json.loads(line) for line in artifact.path("log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(r["feature_std"]) and r["effective_rank"] > 2 for r in log)
    assert len({r["feature_std"] for r in log}) == 13  # the first step, then every fifth
    assert np.mean([r["predict"] for r in log[-5:]]) < np.mean([r["predict"] for r in log[:5]])
    assert not any(name.startswith("objectives") for name in artifact.manifest.files)


def test_a_collapse_on_the_command_line_names_the_checkpoint_and_the_way_out(tmp_path: Path) -> None:
    write_scenes(tmp_path / "data")
    settings = ("jepa.width=16", "jepa.heads=2", "jepa.depth=1", "jepa.min_std=0.999", "jepa.watch_every=1")
    options = {"data": tmp_path / "data", "out": tmp_path / "t", "objective": ("jepa",), "checkpoint_every": 1, **TEACHER}
    with pytest.raises(CollapsedError, match=r"teacher: .*feature_std >= 0\.999.*checkpoint.*Start over"):
        train(set=settings, steps=20, **options)
    assert not (tmp_path / "t").exists()
    log = [json.loads(line) for line in (tmp_path / ".t.partial/log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [0, 1, 2], "the steps that led there are what one wants to see"
    assert set(log[0]) == set(log[-1]) >= {"loss", "feature_std", "effective_rank"}
    assert all(0 < record["feature_std"] < 0.999 for record in log)
