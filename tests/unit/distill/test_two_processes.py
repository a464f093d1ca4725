"""Losses over the whole step's batch are the same, with the same gradient, whether one process computes them or two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fmdeploy.distill.losses.base import MapLoss, OutputLoss
from fmdeploy.distill.losses.registry import make_loss
from fmdeploy.task import load_task
from fmdeploy.training.losses import class_loss

SCRIPT = """
import json, sys, torch, torch.distributed as dist
from fmdeploy.distill.losses.registry import make_loss
from fmdeploy.task import load_task
from fmdeploy.training.losses import class_loss
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
generator = torch.Generator().manual_seed(0)
student, teacher, logits, wanted = (torch.randn(4, *shape, generator=generator)[2 * rank:2 * rank + 2]
                                    for shape in ((3, 2, 2), (5, 2, 2), (2, 6, 6), (2, 6, 6)))
for name in ("distance", "angle", "occupancy"):
    loss, leaf = make_loss(name, {}), (logits if name == "occupancy" else student).clone().requires_grad_()
    value = loss(load_task("bev-occupancy"), {"bev": leaf}, {"bev": wanted}) if name == "occupancy" else loss(leaf, teacher)
    value.backward()
    found[name] = [value.item(), (leaf.grad / 2).tolist()]  # DistributedDataParallel averages over the two
label = torch.tensor([[0, -1], [2, 1]])[rank]  # one process knows less than the other
leaf = torch.arange(12.0).view(4, 3).sin()[2 * rank:2 * rank + 2].clone().requires_grad_()
value = class_loss(leaf, label)
value.backward()
dist.all_reduce(total := value.detach() / 2)  # each holds its part of the mean
found["class"] = [total.item(), (leaf.grad / 2).tolist()]
json.dump(found, open(f"{sys.argv[1]}/{rank}.json", "w"))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_see_one_batch(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    halves = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    generator = torch.Generator().manual_seed(0)
    student, teacher, logits, wanted = (torch.randn(4, *shape, generator=generator)
                                        for shape in ((3, 2, 2), (5, 2, 2), (2, 6, 6), (2, 6, 6)))
    for name in ("distance", "angle", "occupancy"):
        loss, leaf = make_loss(name, {}), (logits if name == "occupancy" else student).clone().requires_grad_()
        if isinstance(loss, OutputLoss):
            value = loss(load_task("bev-occupancy"), {"bev": leaf}, {"bev": wanted})
        else:
            assert isinstance(loss, MapLoss)
            value = loss(leaf, teacher)
        (gradient,) = torch.autograd.grad(value, leaf)
        for half in halves:
            assert half[name][0] == pytest.approx(value.item(), rel=1e-5), name
        found = torch.cat([torch.tensor(half[name][1]) for half in halves])
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-7)
    leaf = torch.arange(12.0).view(4, 3).sin().requires_grad_()
    (gradient,) = torch.autograd.grad(value := class_loss(leaf, torch.tensor([0, -1, 2, 1])), leaf)
    assert [half["class"][0] for half in halves] == pytest.approx([value.item()] * 2)
    torch.testing.assert_close(torch.cat([torch.tensor(half["class"][1]) for half in halves]), gradient)
