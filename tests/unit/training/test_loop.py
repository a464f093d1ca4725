"""The loop on a small regression: it learns, resumes to the bit, accumulates, and stops when the loss is NaN."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fmdeploy.training.checkpoint import latest_checkpoint
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.device import make_accelerator, resolve_precision
from fmdeploy.training.loop import Batch, DivergedError, Job, StoppedError, Tensors, Timing, fit

WEIGHTS = np.random.default_rng(0).normal(size=(6, 1)).astype(np.float32)


def _batch(size: int, parts: int = 1, bad_step: int = -1) -> object:
    def make(step: int, part: int) -> Batch:
        x = np.random.default_rng(step).normal(size=(size, 6)).astype(np.float32)
        x = x[part * size // parts : (part + 1) * size // parts]
        y = x @ WEIGHTS
        if step == bad_step:
            y[:] = np.nan
        return {"inputs": {"x": x}, "targets": {"y": y}}

    return make


def _losses(model: nn.Module, batch: Tensors) -> dict[str, Tensor]:
    error = model(batch["inputs"]["x"]) - batch["targets"]["y"]
    return {"square": error.square().mean(), "size": 1e-3 * error.abs().mean()}


def _job(folder: Path, make: object = None, *, dropout: float = 0.1) -> Job:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1))
    return Job("test", model, make or _batch(32), _losses, folder / "work", folder / "log.jsonl")  # type: ignore[arg-type]


def _config(**changes: object) -> TrainingConfig:
    values = {"steps": 60, "batch": 32, "lr": 1e-2, "precision": "fp32", "checkpoint_every": 20, "ema": 0.9} | changes
    return TrainingConfig.model_validate(values)


def _log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_it_learns_and_logs_every_step(tmp_path: Path) -> None:
    timing = fit(_job(tmp_path, dropout=0.0), _config(steps=300, ema=0.0))
    log = _log(tmp_path)
    assert [record["step"] for record in log] == list(range(300))
    assert log[-1]["square"] < 0.2 * log[0]["square"]
    assert set(log[0]) == {"step", "lr", "grad_norm", "loss", "square", "size"}
    assert log[0]["loss"] == pytest.approx(log[0]["square"] + log[0]["size"])
    assert timing.steps == 300
    assert 0 <= float(timing.as_note()["data_wait_share"]) < 1


def test_the_end_of_a_run_says_its_pace_on_stderr_and_not_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(_job(tmp_path), _config(steps=5))
    heard = capsys.readouterr()
    assert heard.out == ""
    assert re.fullmatch(r"test: 5 steps in \d+ s \([\d.e+]+ a second\); waited for data \d+\.\d% of the time\n", heard.err)
    assert "wait" not in (tmp_path / "log.jsonl").read_text()
    other = tmp_path / "other"
    other.mkdir()
    fit(replace(_job(other), told=False), _config(steps=5))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "waited", "advised"), [(100.0, 19.0, False), (100.0, 21.0, True), (1.0, 0.9, False)])
def test_a_run_that_starved_gets_advice(seconds: float, waited: float, advised: bool) -> None:
    told = Timing(300, seconds, waited).sentence("teacher")
    assert told.startswith(f"teacher: 300 steps in {seconds:.0f} s ({300 / seconds:.3g} a second); "
                           f"waited for data {waited / seconds:.1%} of the time")
    assert ("OMP_NUM_THREADS" in told) == advised


@pytest.mark.parametrize("steps_before", [20, 33, 47])
def test_a_run_that_was_cut_goes_on_to_the_same_bits(tmp_path: Path, steps_before: int) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    expected = _job(whole)
    fit(expected, _config())

    class Stop(Exception):
        pass

    def stopping(step: int, part: int) -> Batch:
        if step == steps_before:
            raise Stop
        made: Batch = _batch(32)(step, part)  # type: ignore[operator]
        return made

    with pytest.raises(Stop):
        fit(_job(cut, stopping), _config())
    resumed = _job(cut)
    timing = fit(resumed, _config())
    assert timing.steps == 60 - steps_before // 20 * 20
    for name, value in expected.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert (whole / "log.jsonl").read_bytes() == (cut / "log.jsonl").read_bytes()


def test_accumulated_parts_equal_the_whole_batch(tmp_path: Path) -> None:
    results = []
    for parts in (1, 4):
        folder = tmp_path / str(parts)
        folder.mkdir()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 1))
        job = Job("test", model, _batch(32, parts), _losses, folder / "work", folder / "log.jsonl")  # type: ignore[arg-type]
        fit(job, _config(accumulation=parts, steps=30))
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_nan_stops_and_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    job = _job(tmp_path, _batch(32, bad_step=43))
    with pytest.raises(DivergedError, match=r"not finite at step 43.*checkpoint-00000040") as caught:
        fit(job, _config())
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    found = latest_checkpoint(tmp_path / "work")
    assert found is not None
    assert found.name == "checkpoint-00000040.safetensors"
    assert _log(tmp_path)[43]["loss"] is None


def test_the_log_of_a_run_that_is_stopped_ends_with_what_it_was_stopped_for(tmp_path: Path) -> None:
    def after_step(step: int) -> dict[str, Tensor]:
        if step == 33:
            raise StoppedError("has seen enough", seen={"spread": torch.tensor(0.25)})
        return {"spread": torch.tensor(1.0)}

    job = dataclasses.replace(_job(tmp_path), after_step=after_step)
    with pytest.raises(StoppedError, match="has seen enough"):
        fit(job, _config())
    log = _log(tmp_path)
    assert [record["step"] for record in log] == list(range(34))
    assert [record["spread"] for record in log[-2:]] == [1.0, 0.25]
    assert set(log[0]) == set(log[-1])
    with pytest.raises(StoppedError):  # going on from step 20 writes the same lines again, none of them twice
        fit(dataclasses.replace(_job(tmp_path), after_step=after_step), _config())
    assert _log(tmp_path) == log


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_a_checkpoint(tmp_path: Path) -> None:
    def losses(model: nn.Module, batch: Tensors) -> dict[str, Tensor]:
        return {"root": (model(batch["inputs"]["x"]) * 0).abs().sqrt().mean()}

    job = dataclasses.replace(_job(tmp_path), losses=losses)
    with pytest.raises(DivergedError, match="gradient is not finite at step 0"):
        fit(job, _config(checkpoint_every=1))
    assert latest_checkpoint(tmp_path / "work") is None


def test_only_two_checkpoints_are_kept_and_none_is_partial(tmp_path: Path) -> None:
    fit(_job(tmp_path), _config(steps=60, checkpoint_every=10))
    names = sorted(path.name for path in (tmp_path / "work").glob("checkpoint-*"))
    assert names == ["checkpoint-00000040.safetensors", "checkpoint-00000050.safetensors"]


def test_bf16_trains_and_leaves_an_ordinary_network(tmp_path: Path) -> None:
    job = _job(tmp_path, dropout=0.0)
    fit(job, _config(precision="bf16", steps=300, ema=0.0))
    assert _log(tmp_path)[-1]["square"] < 0.2 * _log(tmp_path)[0]["square"]
    assert all(p.dtype == torch.float32 for p in job.model.parameters())
    with torch.no_grad():
        assert job.model.eval()(torch.zeros(2, 6)).dtype == torch.float32
    assert "forward" not in vars(job.model)


def test_accelerate_still_refuses_a_second_precision_without_the_reset() -> None:
    """When this fails the reset in `make_accelerator` can go."""
    import accelerate

    make_accelerator("fp32")
    with pytest.raises(ValueError, match="already been initialized"):
        accelerate.Accelerator(mixed_precision="bf16")
    assert make_accelerator("bf16").mixed_precision == "bf16"


def test_auto_precision_is_resolved() -> None:
    assert resolve_precision("auto") in ("fp32", "bf16", "fp16")
    assert resolve_precision("fp32") == "fp32"
