from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fmdeploy.data.format import open_dataset
from fmdeploy.data.from_arrays import write_arrays
from fmdeploy.errors import ConfigError
from fmdeploy.models import example_inputs
from fmdeploy.plan.fake import measure_pass
from fmdeploy.plan.plan import plan
from fmdeploy.plan.tokens import effective_share, tokens_per_example
from fmdeploy.task import load_task

SMALL = {"dim": 32, "depth": 2, "heads": 2, "stem_width": 8, "width": 16}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 16 * 16, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(torch.relu(self.conv(x)).flatten(1))
        return y


PLAIN = Plain()


def summed() -> Callable[[], torch.Tensor]:
    return lambda: PLAIN(torch.zeros(2, 3, 16, 16)).sum()


def test_flops_are_those_of_the_formula() -> None:
    forward = 2 * 2 * (16 * 16 * 8 * 3 * 9 + 8 * 16 * 16 * 7)  # two samples
    found = measure_pass(PLAIN, summed(), "fp32")
    assert found.forward_flops == forward
    # the backward pass is twice that, less the gradient of the input, which nobody asks for
    assert found.total_flops == 3 * forward - 2 * 2 * 16 * 16 * 8 * 3 * 9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_shapes_alone_say_what_a_computed_pass_says(precision: str, recompute: bool) -> None:
    """`torch._subclasses` is private: this fails where a new torch changes what it counts."""
    task = load_task("bev-occupancy")
    module = task.teacher({**SMALL, "activation_checkpointing": recompute})

    def loss() -> torch.Tensor:
        return torch.stack([value.float().sum() for value in module(*example_inputs(task.io, 2))]).sum()

    fake, real = (measure_pass(module, loss, precision, fake=fake) for fake in (True, False))  # type: ignore[arg-type]
    assert fake.forward_flops == real.forward_flops
    assert fake.total_flops == real.total_flops
    assert fake.activation_bytes == pytest.approx(real.activation_bytes, rel=0.3)


def test_nothing_is_left_behind_in_the_network() -> None:
    PLAIN.eval()
    before = {name: value.clone() for name, value in PLAIN.state_dict().items()}
    measure_pass(PLAIN, summed(), "fp32")
    assert not PLAIN.training
    assert all(parameter.grad is None for parameter in PLAIN.parameters())
    assert all(torch.equal(value, before[name]) for name, value in PLAIN.state_dict().items())


def test_recomputing_saves_memory_and_costs_flops() -> None:
    whole, saved = (plan(activation_checkpointing=recompute, precision="fp32").data for recompute in (False, True))
    assert saved["memory_mib"]["activations"] < whole["memory_mib"]["activations"] / 3
    assert saved["flops"]["per_sample"] > 1.2 * whole["flops"]["per_sample"]
    assert saved["flops"]["forward_per_sample"] == whole["flops"]["forward_per_sample"]


def test_memory_and_flops_follow_the_run() -> None:
    one = plan(precision="fp32", batch=16, **SMALL).data
    parts = plan(precision="fp32", batch=16, accumulation=4, ema=0.99, **SMALL).data
    shared = plan(precision="fp32", batch=16, processes=2, **SMALL).data
    assert parts["memory_mib"]["activations"] == pytest.approx(one["memory_mib"]["activations"] / 4, rel=0.02)  # constants that are kept do not shrink
    assert shared["memory_mib"]["activations"] == pytest.approx(one["memory_mib"]["activations"] / 2, rel=0.02)
    assert parts["memory_mib"]["average"] == one["memory_mib"]["weights"]
    assert one["memory_mib"]["optimizer"] == pytest.approx(2 * one["memory_mib"]["gradients"], abs=0.01)
    assert one["flops"]["run"] == one["flops"]["per_sample"] * 16 * 800


def test_tokens_in_every_unit() -> None:
    task = load_task("bev-occupancy")
    found = tokens_per_example(task, task.teacher(SMALL))
    assert found == {"frames": 4, "patches": 64, "codes": 4 * 16 * 16, "cells": 64 * 64, "targets": 5 * 64 * 64}
    assert tokens_per_example(task, Plain())["patches"] == 0


def test_near_duplicates_are_taken_out_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scenes = rng.random((20, 3, 48, 48)).astype(np.float32)
    noisy = np.clip(scenes[:5] + 0.01 * rng.standard_normal(scenes[:5].shape), 0, 1).astype(np.float32)
    image = np.concatenate([scenes, noisy, scenes[:5]])
    write_arrays(tmp_path / "data", {"image": image, "label": np.zeros(30, np.int64)}, {"train": np.arange(30)})
    found = effective_share(open_dataset(tmp_path / "data"), "train")
    assert found["frames"] == 30
    assert found["near_duplicates"] == 10
    assert found["share"] == pytest.approx(20 / 30)


def test_options_that_do_not_fit_together() -> None:
    for name, value in {"flops": 1e18, "law": "kaplan", "draws": 10, "seed": 1, "confidence": 0.9}.items():
        with pytest.raises(ConfigError, match=f"--{name} needs --fit"):
            plan(**{name: value})
    for name, value in {"steps": 10, "objective": ["mae"], "processes": 2, "dim": 64}.items():
        with pytest.raises(ConfigError, match=f"{name} is of a run to come, and --fit reads finished ones"):
            plan(fit="runs.csv", **{name: value})
    with pytest.raises(ConfigError, match="either --fit or --data"):
        plan(fit="runs.csv", data="data")
    with pytest.raises(ConfigError, match="must be a multiple of heads"):
        plan(dim=33, heads=2)
    with pytest.raises(ConfigError, match="cannot be cut into equal parts"):
        plan(batch=16, processes=3)
    with pytest.raises(ConfigError, match="nothing to shard with"):
        plan(sharding="fsdp")
    with pytest.raises(ConfigError, match="unknown key 'clip'"):
        plan(clip=2.0)
