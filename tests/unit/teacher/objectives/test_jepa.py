"""JEPA: what it hides, how its target moves, and that a collapse is caught (and a healthy run is not)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fmdeploy.errors import ConfigError
from fmdeploy.models.tokens import backbone_of
from fmdeploy.task import load_task
from fmdeploy.teacher.objectives.base import CollapsedError
from fmdeploy.teacher.objectives.jepa import Jepa, JepaConfig, standardised
from fmdeploy.teacher.objectives.predictor import blanked, places
from fmdeploy.teacher.objectives.selfdistill_average import MovingCopy
from fmdeploy.teacher.train import train
from fmdeploy.training.ema import WeightAverage
from support.training_data import TEACHER, write_scenes

SIZES = {key: TEACHER[key] for key in ("dim", "depth", "heads", "stem_width", "width")}
SMALL: dict[str, Any] = {"width": 16, "heads": 2, "depth": 1}


def _jepa(steps: int = 10, **options: Any) -> tuple[nn.Module, Jepa, dict[str, dict[str, Tensor]]]:
    """Teacher, objective and a batch of four random scenes."""
    torch.manual_seed(0)
    task = load_task("bev-occupancy")
    teacher = task.teacher(SIZES)
    objective = Jepa(task, teacher, JepaConfig(**{**SMALL, **options}), steps=steps)
    inputs = {spec.name: (torch.rand(4, *spec.shape) < 0.2).float() for spec in task.io.inputs}
    rngs = [np.random.default_rng((3, place)) for place in range(4)]
    drawn = objective.arrays(None, np.arange(4), rngs)  # type: ignore[arg-type]
    masks = {kind: {name: torch.from_numpy(value) for name, value in arrays.items()} for kind, arrays in drawn.items()}
    return teacher, objective, {"inputs": inputs, **masks}


def test_the_backbone_sees_the_context_alone_and_the_target_everything() -> None:
    teacher, objective, batch = _jepa()
    contexts: list[Tensor] = []
    wanted: list[Tensor] = []
    objective.predictor.register_forward_pre_hook(lambda _m, inputs: contexts.append(inputs[0].detach()))
    objective.monitor.see = wanted.append  # type: ignore[method-assign, assignment]
    hidden_BN = ~places(batch["jepa"]["context"], 64)
    other = {name: blanked(x, hidden_BN) + blanked(1 - x, ~hidden_BN) for name, x in batch["inputs"].items()}
    for inputs in (batch["inputs"], other):
        objective.losses(teacher, {**batch, "inputs": inputs})
    torch.testing.assert_close(contexts[0], contexts[1], rtol=0, atol=0)
    assert (wanted[0] - wanted[1]).abs().max() > 0.01


def test_a_predictor_that_is_right_has_no_loss_and_the_target_gets_no_gradient() -> None:
    teacher, objective, batch = _jepa()
    loss = objective.losses(teacher, batch)["predict"]
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in objective.target.parameters())
    trained = [*backbone_of(teacher, where="").parameters(), *objective.predictor.parameters()]
    assert all(p.grad is not None for p in trained if p.requires_grad)
    truth = standardised(objective.target.tokens(*batch["inputs"].values())[:, 1:])
    asked = batch["jepa"]["targets"].flatten(1)
    objective._predicted = lambda *_: truth.gather(1, asked[..., None].expand(-1, -1, 16))  # type: ignore[method-assign]
    assert float(objective.losses(teacher, batch)["predict"]) == 0


def test_blocks_are_predicted_alone() -> None:
    teacher, objective, batch = _jepa()
    masks, backbone = batch["jepa"], backbone_of(teacher, where="")
    state = backbone.tokens(*batch["inputs"].values(), keep_BK=masks["context"])
    together = objective._predicted(state, masks["context"], masks["targets"])
    alone = [objective._predicted(state, masks["context"], masks["targets"][:, k : k + 1]) for k in range(4)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1))


def test_the_targets_are_centred_on_their_place_and_of_unit_variance() -> None:
    tokens = torch.randn(64, 4, 8) + 50 * torch.randn(4, 8)
    found = standardised(tokens)
    torch.testing.assert_close(found.var(-1, unbiased=False), torch.ones(64, 4), rtol=1e-3, atol=1e-3)
    assert found.mean(0).abs().max() < 0.3  # the place's share of 50 is gone
    assert torch.isfinite(standardised(tokens[:1])).all()


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


def test_blocks_that_leave_no_context_are_refused() -> None:
    with pytest.raises(ConfigError, match="may cover the whole picture"):
        _jepa(blocks=8)


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
        blank_BN = ~places(batch["jepa"]["context"], 64)
        part = backbone.tokens(*(blanked(x, blank_BN) for x in inputs.values()))[:, 1:]
        whole = objective.target.tokens(*inputs.values())[:, 1:].detach()
        objective.monitor.see(whole)
        return {"predict": nn.functional.mse_loss(part, whole) + whole.new_zeros(())}

    objective.losses = agree  # type: ignore[method-assign, assignment]
    optimizer = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=1e-2)
    healthy = float(_step(teacher, objective, batch, optimizer, 0)["feature_std"])
    assert healthy > 0.1
    with pytest.raises(CollapsedError, match=r"collapsed at step \d+.*--set jepa\.decay=0\.998"):
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
