"""Sums of three processes through shared memory: right, the same bits everywhere, and ended in words when one is gone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fmdeploy.training.neighbours import MEMORY

SCRIPT = """
import gc, json, sys, weakref
from pathlib import Path
import torch
import torch.distributed as dist
from fmdeploy.errors import FmdeployError
from fmdeploy.training import distributed, neighbours
from fmdeploy.training.distributed import add_up, sum_over_ranks

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
if sys.argv[3] == "apart" and rank == 1:
    neighbours._opened = lambda *_: None  # as on a machine that does not see the file
if sys.argv[3] == "no room":
    neighbours.MEMORY = Path("/nonexistent")
if sys.argv[3] == "unheard":
    neighbours.PATIENCE = 1
    if rank == 2:
        neighbours._connected = lambda *_: []  # as if its calls failed
near = neighbours.meet()
said = {"near": near is not None}
for name, wanted in {"small": (5,), "scalar": (), "large": (3, 400001)}.items():
    x = torch.rand(wanted, generator=torch.Generator().manual_seed(rank))
    every = [torch.rand(wanted, generator=torch.Generator().manual_seed(r)) for r in range(3)]
    add_up(x)
    said[name] = bool(torch.equal(x, every[0] + every[1] + every[2]))
count = torch.tensor([rank, 2**40])
add_up(count)
said["count"] = count.tolist()
every = [torch.full((n,), float(rank), dtype=kind) for n, kind in
         ((300_000, torch.float64), (1, torch.float32), (0, torch.int64), (7, torch.bfloat16), (1 << 20, torch.uint8))]
if near:
    near.add_up(every)
    said["several"] = [len(x) for x in every if not bool((x == 3).all())]
x = torch.ones(2, 3).T.requires_grad_()
total = sum_over_ranks(x * (rank + 1))
total.sum().backward()
said["gradient"] = [total.tolist(), x.grad.tolist()]
Path(folder, f"{rank}.json").write_text(json.dumps(said))
if near and sys.argv[3] == "gone":
    if rank == 2:
        raise SystemExit(0)
    try:
        near.add_up([torch.ones(3)])
    except FmdeployError as error:
        said["error"] = [error.exit_code, str(error)]
if near and sys.argv[3] == "astray":
    try:
        near.add_up([torch.ones(3 + rank)])
    except FmdeployError as error:
        said["error"] = [error.exit_code, str(error)]
    dist.barrier()
if near and sys.argv[3] == "left":
    found = distributed._neighbours()
    sockets, found = list(found.others), weakref.ref(found)
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()
    said["left"] = [found() is None, [other.fileno() for other in sockets]]
Path(folder, f"{rank}.json").write_text(json.dumps(said))
"""


def run(folder: Path, how: str) -> list[dict[str, Any]]:
    """What each of three processes found; they leave nothing behind."""
    before = set(MEMORY.glob("fmdeploy-*"))
    children = [subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), str(folder), how], stderr=subprocess.PIPE)
                for rank in range(3)]
    said = [child.communicate()[1].decode() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], said
    assert set(MEMORY.glob("fmdeploy-*")) <= before
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("how", ["gone", "astray", "left"])
def test_sums_are_those_of_all_processes(tmp_path: Path, how: str) -> None:
    for rank, said in enumerate(run(tmp_path, how)):
        assert said["near"]
        assert [said[name] for name in ("small", "scalar", "large")] == [True] * 3
        assert said["count"] == [3, 3 * 2**40]
        assert said["several"] == []
        assert said["gradient"] == [[[6.0] * 2] * 3, [[3.0 * (rank + 1)] * 2] * 3]
        if how == "astray":
            assert said["error"][0] == 4
            assert "not at the same sum" in said["error"][1]
        elif how == "left":
            assert said["left"] == [True, [-1, -1]]  # memory and sockets end with the process group
        elif rank < 2:
            assert said["error"] == [3, "another process of this run has ended. Its own message says why"]


@pytest.mark.parametrize("how", ["apart", "no room", "unheard"])
def test_a_process_that_does_not_share_the_memory_leaves_all_to_gloo(tmp_path: Path, how: str) -> None:
    for said in run(tmp_path, how):
        assert not said["near"]
        assert said["count"] == [3, 3 * 2**40]
        assert said["gradient"][0] == [[6.0] * 2] * 3
