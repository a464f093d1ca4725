"""Early stop: the best state stays, training ends when nothing gets better, and a killed run goes on to the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.log import parse_log
from fmdeploy.training.loop import Batch, Job, Tensors, Timing, fit
from fmdeploy.training.validation import BestState, Validation

CONFIG: dict[str, Any] = {"steps": 40, "batch": 2, "lr": 1e-2, "precision": "fp32", "checkpoint_every": 7, "warmup": 0.0,
                          "weight_decay": 0.0}


def _batch(step: int, part: int) -> Batch:
    return {"inputs": {"x": np.random.default_rng(step).normal(size=(2, 3)).astype(np.float32)}}


def _losses(model: nn.Module, batch: Tensors) -> dict[str, Tensor]:
    return {"fit": model(batch["inputs"]["x"]).square().mean()}


def _run(work: Path, validation: Validation | None, **changes: Any) -> tuple[nn.Module, Timing]:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    config = TrainingConfig.model_validate(CONFIG | changes)
    work.mkdir(exist_ok=True)
    return net, fit(Job("toy", net, _batch, _losses, work / "check", work / "log.jsonl", validation), config)


class Scores:
    """Judges by the number of looks: the `best` one is the highest."""

    def __init__(self, best: int) -> None:
        self.best, self.looks = best, 0
        self.states: list[Tensor] = []

    def __call__(self, model: nn.Module) -> float:
        self.states.append(model.get_parameter("weight").detach().clone())
        self.looks += 1
        return -abs(self.looks - 1 - self.best)


def test_the_best_state_stays_and_patience_ends_the_run(tmp_path: Path) -> None:
    scores = Scores(best=3)
    net, timing = _run(tmp_path, Validation(every=4, patience=2, score=scores))
    assert [step for step, _ in timing.judged] == [0, 4, 8, 12, 16, 20]
    assert (timing.best_step, timing.steps) == (12, 20)
    assert torch.equal(net.get_parameter("weight"), scores.states[3])
    assert not torch.equal(scores.states[3], scores.states[-1])
    logged = {record["step"] + 1: record["validation"] for record in parse_log(tmp_path / "log.jsonl")
              if "validation" in record}
    assert logged == {step: score for step, score in timing.judged if step}


def test_without_patience_it_runs_to_the_end_and_judges_the_last_state(tmp_path: Path) -> None:
    scores = Scores(best=2)
    _, timing = _run(tmp_path, Validation(every=12, patience=0, score=scores))
    assert [step for step, _ in timing.judged] == [0, 12, 24, 36, 40]
    assert timing.best_step == 24


def test_a_run_that_only_gets_worse_keeps_the_untrained_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fresh = nn.Linear(3, 2)
    net, timing = _run(tmp_path, Validation(every=5, patience=2, score=Scores(best=0)))
    assert timing.best_step == 0
    assert torch.equal(net.get_parameter("weight"), fresh.weight)


def test_without_validation_nothing_changes(tmp_path: Path) -> None:
    plain, timing = _run(tmp_path / "a", None)
    judged, _ = _run(tmp_path / "b", Validation(every=10, patience=0, score=lambda model: float("nan")))
    assert (timing.best_step, timing.judged) == (40, ())
    assert not torch.equal(plain.get_parameter("weight"), judged.get_parameter("weight")), "NaN never beats the first"


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_killed_run_goes_on_to_the_same_best_state(tmp_path: Path, ema: float) -> None:
    def score(model: nn.Module) -> float:  # best somewhere in the middle, on both sides of the kill
        return -abs(float(model.get_parameter("weight").detach().abs().mean()) - 0.22)

    whole, timing = _run(tmp_path / "whole", Validation(3, 0, score), ema=ema)
    calls = 0

    def dies(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return score(model)

    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "cut", Validation(3, 0, dies), ema=ema)
    resumed, again = _run(tmp_path / "cut", Validation(3, 0, score), ema=ema)
    assert again.steps < timing.steps
    assert again.judged == timing.judged
    assert 0 < again.best_step == timing.best_step < 40
    assert torch.equal(whole.get_parameter("weight"), resumed.get_parameter("weight"))


def test_equal_scores_keep_the_earlier_state() -> None:
    net, best = nn.Linear(1, 1), BestState()
    for step in (0, 5):
        best.take(net, step, 1.0)
    assert (best.step, best.exhausted(1), best.exhausted(2)) == (0, True, False)
