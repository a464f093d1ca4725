"""What ends a run early: a loss that grows and stays, a NaN in the data; and what a loss scaler does to that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fmdeploy.data.format import open_dataset
from fmdeploy.data.from_arrays import write_arrays
from fmdeploy.task import load_task
from fmdeploy.training import loop
from fmdeploy.training.batches import SupervisedBatches
from fmdeploy.training.checkpoint import latest_checkpoint
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.device import make_accelerator
from fmdeploy.training.loop import Batch, DivergedError, Job, Tensors, fit
from fmdeploy.training.mixture.options import Mixture
from fmdeploy.training.timing import TIMING_LOG
from fmdeploy.training.watch import FIRST, PATIENCE, LossWatch

Scale = Callable[[int], float]


def _job(folder: Path, scale: Scale, stop: int = -1) -> Job:
    """A regression whose targets at each step are `scale(step)` times what they were."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)

    def batch(step: int, part: int) -> Batch:
        if step == stop:
            raise InterruptedError
        x = np.random.default_rng(step).normal(size=(8, 3)).astype(np.float32)
        return {"inputs": {"x": x}, "targets": {"y": np.float32(scale(step)) * x[:, :1]}}

    def losses(model: nn.Module, given: Tensors) -> dict[str, Tensor]:
        return {"error": (model(given["inputs"]["x"]).float() - given["targets"]["y"]).square().mean()}

    return Job("test", nn.Linear(3, 1), batch, losses, folder / "work", folder / "log.jsonl")


def _config(**changes: Any) -> TrainingConfig:
    values = {"steps": 100, "batch": 8, "lr": 1e-3, "precision": "fp32", "checkpoint_every": 10} | changes
    return TrainingConfig.model_validate(values)


def _text(error: BaseException) -> str:
    return str(error)


def test_a_loss_that_grows_and_stays_stops_the_run_and_leaves_a_checkpoint_from_before(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"grew at step 45 .*10 times its median, for 20 steps") as caught:
        fit(_job(tmp_path, lambda step: 1.0 if step < 45 else 30.0), _config())
    assert "The last good checkpoint is checkpoint-00000040.safetensors" in str(caught.value)
    assert caught.value.exit_code == 2
    found = latest_checkpoint(tmp_path / "work")
    assert found is not None
    assert found.name == "checkpoint-00000040.safetensors"


def test_a_resumed_run_diverges_at_the_same_step_with_the_same_words(tmp_path: Path) -> None:
    def scale(step: int) -> float:
        return 1.0 if step < 45 else 30.0

    with pytest.raises(DivergedError) as whole:
        fit(_job(tmp_path / "whole", scale), _config())
    with pytest.raises(InterruptedError):
        fit(_job(tmp_path / "cut", scale, stop=33), _config())
    with pytest.raises(DivergedError) as cut:
        fit(_job(tmp_path / "cut", scale), _config())
    assert _text(cut.value) == _text(whole.value)
    assert (tmp_path / "cut/log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()


@pytest.mark.parametrize(("scale", "factor"), [
    (lambda step: 30.0 if 45 <= step < 45 + PATIENCE - 2 else 1.0, 10.0),  # some bad batches
    (lambda step: 30.0 if step >= 45 else 1.0, 0.0),  # switched off
    (lambda step: 2.0 if step >= 45 else 1.0, 10.0),  # harder, not hopeless
])
def test_what_is_no_divergence_trains_to_the_end(tmp_path: Path, scale: Scale, factor: float) -> None:
    assert fit(_job(tmp_path, scale), _config(divergence=factor)).steps == 100


def test_no_checkpoint_is_written_while_the_loss_is_too_high(tmp_path: Path) -> None:
    fit(_job(tmp_path, lambda step: 30.0 if 45 <= step < 55 else 1.0), _config(steps=60))
    names = sorted(path.name for path in (tmp_path / "work").glob("checkpoint-*"))
    assert names == ["checkpoint-00000030.safetensors", "checkpoint-00000040.safetensors"]


def test_the_watch_is_a_function_of_the_losses() -> None:
    losses = [*np.random.default_rng(0).uniform(0.5, 1.5, 60), *[8.0] * 10, *[1.0] * 5, *[50.0] * PATIENCE]
    watch, said = LossWatch(5.0), []
    for step, loss in enumerate(losses):
        copy = LossWatch(5.0)
        copy.restore(watch.to_text())
        said.append(watch.diverges(step, float(loss)))
        assert copy.diverges(step, float(loss)) == said[-1]
        assert copy == watch
    assert said == [False] * (len(losses) - 1) + [True]
    assert watch.since == len(losses) - PATIENCE


def test_a_loss_that_began_at_zero_may_rise() -> None:
    watch = LossWatch(10.0)
    assert not any(watch.diverges(step, 1e-6 if step < FIRST else 0.05) for step in range(200))


def test_a_nan_planted_in_the_data_stops_and_names_the_checkpoint(tmp_path: Path) -> None:
    """Images of a DATASET, of which one holds a NaN: the run ends at the step that draws it."""
    rng = np.random.default_rng(0)
    images = rng.random((64, 3, 32, 32)).astype(np.float32)
    images[50, 1, 4, 4] = np.nan
    write_arrays(tmp_path / "data", {"image": images, "label": rng.integers(0, 10, 64)}, {"train": np.arange(64)})
    task, config = load_task("image-classification"), _config(steps=16, checkpoint_every=1, mirror=False)
    samples = task.samples(open_dataset(tmp_path / "data"), "train")
    batches = SupervisedBatches(task, Mixture(samples), config)
    step = next(step for step in range(8) if 50 in batches.sampler.index(step))

    def losses(model: nn.Module, batch: Tensors) -> dict[str, Tensor]:
        logits = model(batch["inputs"]["image"])
        return {"hard": nn.functional.cross_entropy(logits, batch["targets"]["label"])}

    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    job = Job("teacher", model, batches, losses, tmp_path / "work", tmp_path / "log.jsonl")
    good = f"checkpoint-{step:08d}.safetensors" if step else "No checkpoint was written yet"
    with pytest.raises(DivergedError, match=rf"not finite at step {step}.*{good}"):
        fit(job, config)


def test_the_time_spent_waiting_is_told_while_it_trains(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Bar:
        def advance(self, steps: int, **numbers: float) -> None:
            seen.append(numbers)

    run = loop.Run(_job(tmp_path, lambda step: 1.0), _config(steps=35))
    run.train()
    lines = [json.loads(line) for line in (tmp_path / "work" / TIMING_LOG).read_text().splitlines()]
    assert [line["steps"] for line in lines] == [10, 20, 30, 35]
    assert all(0 <= line["data_wait_share"] <= 1 and line["steps_per_s"] > 0 for line in lines)
    run.pending.append({"step": 35, "lr": 0.1, "grad_norm": torch.tensor(1.0), "loss": torch.tensor(1.0)})
    run._flush(Bar(), 36)  # type: ignore[arg-type]
    assert set(seen[0]) == {"loss", "data_wait"}


class _Scaled:
    """Gives the loop an accelerator that computes in fp16 and scales the loss on the CPU, as it does on a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scalers: list[torch.amp.GradScaler] = []
        monkeypatch.setattr(loop, "make_accelerator", self)

    def __call__(self, precision: str, sharding: Any = None) -> Any:
        made = make_accelerator("fp16", sharding)
        made.native_amp = True
        made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
        self.scalers.append(made.scaler)
        return made


def test_a_scaled_run_skips_an_overflow_and_resumes_with_its_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real scaler: it halves at the overflow of step 12, grows every 7 good steps, and a checkpoint keeps it."""
    def scale(step: int) -> float:
        return 1e3 if step == 12 else 1.0  # its gradient, times the scale, is beyond fp16

    config, scaled = _config(steps=40, divergence=0.0), _Scaled(monkeypatch)
    whole = _job(tmp_path / "whole", scale)
    fit(whole, config)
    with pytest.raises(InterruptedError):
        fit(_job(tmp_path / "cut", scale, stop=25), config)
    cut = _job(tmp_path / "cut", scale)
    assert fit(cut, config).steps == 20
    log = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert log[12]["grad_norm"] is None
    assert all(record["grad_norm"] is not None for record in log if record["step"] != 12)
    assert scaled.scalers[0].state_dict() == scaled.scalers[2].state_dict()
    good = 12 // 7 + (40 - 13) // 7
    assert scaled.scalers[0].get_scale() == 2.0**10 * 2**good / 2
    for ours, theirs in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert (tmp_path / "cut/log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()


def test_scaling_changes_nothing_but_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _job(tmp_path / "plain", lambda step: 1.0)
    fit(plain, _config(steps=30))
    _Scaled(monkeypatch)
    scaled = _job(tmp_path / "scaled", lambda step: 1.0)
    fit(scaled, _config(steps=30))
    for ours, theirs in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-3)  # of a way of up to 0.03
