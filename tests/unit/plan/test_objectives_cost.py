"""What a plan says of a step, against `torch.utils.flop_counter` and autograd on steps that are really done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from fmdeploy.cli import group
from fmdeploy.data.format import open_dataset
from fmdeploy.errors import ConfigError
from fmdeploy.plan.memory import state_of
from fmdeploy.plan.plan import plan
from fmdeploy.plan.step import FEW, Subject
from fmdeploy.task import load_task
from fmdeploy.teacher.objectives.pretraining import Pretraining, PretrainingBatches
from fmdeploy.teacher.objectives.registry import choose
from fmdeploy.teacher.train import TeacherConfig
from fmdeploy.training.config import StepConfig
from fmdeploy.training.loop import to_tensors
from fmdeploy.training.mixture.options import Mixture
from fmdeploy.training.sharding import units
from support.training_data import write_scenes

SIZES = {"dim": 32, "depth": 2, "heads": 2, "stem_width": 8, "width": 16}
SMALL: dict[str, Any] = {**SIZES, "precision": "fp32", "batch": 4, "steps": 8}
LABEL_FREE = ("mae", "jepa", "selfdistill", "contrastive", "flow", "worldmodel")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DATASET of tiny scenes."""
    return write_scenes(tmp_path_factory.mktemp("plan") / "data").root


def counted(scenes: Path, objective: str, *, step: int = 0, batch: int = 4) -> float:
    """FLOPs of one step of `teacher train`, really computed on its own batches."""
    config = TeacherConfig(data=scenes, out=scenes / "none", objective=(objective,), **{**SMALL, "batch": batch})
    task = load_task(config.task)
    whole = Pretraining(task, task.teacher(config.sizes()), choose(config.objective, ()), steps=config.steps)
    mixture = Mixture(task.samples(open_dataset(scenes), "train"))
    batches = PretrainingBatches(task, mixture, config, objectives=tuple(whole.each().values()))
    flops = 0.0
    with FlopCounterMode(display=False) as counter:
        for number in range(step + 1):
            before = counter.get_total_flops()
            sum(whole(to_tensors(batches(number, 0), torch.device("cpu"))).values()).backward()
            flops = float(counter.get_total_flops() - before)
            whole.after_step(number)
    return flops


@pytest.mark.parametrize("objective", ["supervised", *LABEL_FREE[:-1]])
def test_the_flops_of_a_step_are_those_that_a_real_one_counts(scenes: Path, objective: str) -> None:
    real = counted(scenes, objective)
    for data in (None, scenes):  # zeros that stand in for samples, and samples
        found = plan(objective=(objective,), data=data, **SMALL).data
        assert found["flops"]["per_step"] == pytest.approx(real, rel=1e-9)


def test_a_world_model_does_other_work_once_its_tokeniser_is_trained(scenes: Path) -> None:
    found = plan(objective=("worldmodel",), **SMALL).data
    assert [(phase["first"], phase["steps"]) for phase in found["phases"]] == [(0, 2), (2, 6)]
    per_step = [4 * phase["flops_per_sample"] for phase in found["phases"]]
    assert per_step == pytest.approx([counted(scenes, "worldmodel"), counted(scenes, "worldmodel", step=2)])
    assert found["flops"]["run"] == pytest.approx(2 * per_step[0] + 6 * per_step[1])


def test_a_plan_asks_objectives_as_training_does(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds, shapes and types of arrays, and what is refused."""
    config = TeacherConfig(data=scenes, out=scenes / "none", objective=("mae", "worldmodel"), **SMALL)
    task, samples = load_task(config.task), load_task(config.task).samples(open_dataset(scenes), "train")
    subject = Subject(task, task.teacher(config.sizes()), choose(config.objective, ()), samples)
    whole = subject.whole(config.steps)
    batches = PretrainingBatches(task, Mixture(samples), config, objectives=tuple(whole.each().values()))

    def looks(batch: dict[str, Any]) -> dict[str, Any]:
        return {kind: {name: (a.shape, a.dtype) for name, a in arrays.items()} for kind, arrays in batch.items()}

    assert looks(subject.batch(whole, 4)) == looks(batches(0, 0))
    monkeypatch.setattr(type(whole.each()["mae"]), "arrays", lambda *_: {"worldmodel": {}})
    same = "two objectives make the same kind of array"
    with pytest.raises(ConfigError, match=same):
        subject.batch(whole, 4)
    with pytest.raises(ConfigError, match=same):
        batches(0, 0)


@pytest.mark.parametrize("objective", LABEL_FREE)
def test_an_objectives_own_parts_are_counted(objective: str) -> None:
    found, bare = plan(objective=(objective,), **SMALL).data, plan(**SMALL).data
    own = found["objectives"][objective]
    assert found["params"] == bare["params"]
    assert own["params"] > 0
    grown = (own["params"] + own["buffers"]) * 4 / 2**20
    assert found["memory_mib"]["weights"] - bare["memory_mib"]["weights"] == pytest.approx(grown, rel=0.01)
    assert found["memory_mib"]["gradients"] == pytest.approx(found["trainable"] * 4 / 2**20, abs=1e-3)


def test_several_objectives_cost_what_they_cost_together_and_options_count() -> None:
    apart = [plan(objective=(name,), **SMALL).data["flops"]["per_step"] for name in ("mae", "flow")]
    both = plan(objective=("mae", "flow=2"), **SMALL).data
    assert both["flops"]["per_step"] == pytest.approx(sum(apart))
    wider = plan(objective=("mae",), set=("mae.width=192",), **SMALL).data
    assert wider["objectives"]["mae"]["params"] > 2 * both["objectives"]["mae"]["params"]
    coarse = plan(objective=("worldmodel",), set=("worldmodel.grid=8",), **SMALL).data
    assert coarse["tokens_per_example"]["codes"] == 4 * 64


def test_what_is_not_counted_is_said(scenes: Path) -> None:
    answer = CliRunner().invoke(group, ["plan", "--dim", "32", "--heads", "2", "--depth", "1"])
    assert "not counted: " in answer.output
    assert "the loss against labels" in answer.output
    assert "decoded of the dataset, for bev-occupancy some 64 MiB at most" in answer.output
    assert not [text for text in plan(data=scenes, **SMALL).data["not_counted"] if "labels" in text]
    computed = CliRunner().invoke(group, ["plan", "--objective", "selfdistill", "--dim", "32", "--heads", "2",
                                          "--depth", "1", "--steps", "2"])
    assert "three small steps that were computed" in computed.output


@pytest.mark.parametrize("objective", ["contrastive", "selfdistill"])
def test_what_small_steps_say_of_a_larger_one_is_what_it_takes(scenes: Path, objective: str) -> None:
    """A step of 12 samples, which contrast with each other, from steps of 2, 3 and 4."""
    assert max(FEW) == 4
    larger = {**SMALL, "batch": 12}
    assert plan(objective=(objective,), **larger).data["flops"]["per_step"] == pytest.approx(counted(scenes, objective, batch=12))


GATHERING = """
import json, sys, torch, torch.distributed as dist
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_objectives_cost import counted
torch.set_num_threads(1)
dist.init_process_group("gloo")
flops = counted(Path(sys.argv[1]), "contrastive")
if dist.get_rank() == 0:
    print(json.dumps(flops))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_keys_that_other_processes_send_are_counted(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(GATHERING)
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(tmp_path / "script.py"), str(scenes), str(here)]
    paths = os.pathsep.join([str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = plan(objective=("contrastive",), processes=2, **SMALL).data
    assert found["flops"]["per_step"] / 2 == pytest.approx(json.loads(done.stdout), rel=1e-9)
    alone = plan(objective=("contrastive",), **{**SMALL, "batch": 2}).data
    assert found["flops"]["per_step"] > 2 * alone["flops"]["per_step"]
    assert found["memory_mib"]["activations"] > alone["memory_mib"]["activations"]


def test_shares_of_a_sharded_run_are_counted_as_shares() -> None:
    whole = plan(processes=2, **SMALL).data["memory_mib"]
    shares = plan(processes=2, sharding="fsdp", **SMALL).data["memory_mib"]
    for name in ("weights", "gradients", "optimizer"):
        assert shares[name] == pytest.approx(whole[name] / 2, rel=0.05), name  # an odd row goes to the first process
    assert shares["activations"] == whole["activations"]
    assert whole["gathered"] == 0
    assert shares["gathered"] > 0


def test_what_is_gathered_is_the_rest_and_two_blocks_with_the_gradients_of_one() -> None:
    task = load_task("bev-occupancy")
    module = task.teacher(SIZES)
    whole = Subject(task, module, choose(("supervised",), ()), ()).whole(8)  # type: ignore[arg-type]
    blocks = [sum(p.numel() for p in unit.parameters()) for unit in units(whole)]
    assert len(blocks) == 2
    rest = sum(p.numel() for p in module.parameters()) - sum(blocks)
    config = StepConfig(sharding="fsdp", ema=0.9)
    found = state_of(whole, config, 4)
    assert found.gathered == 4 * (2 * rest + 3 * blocks[0])
    assert found.average == found.weights < sum(p.numel() for p in module.parameters()) * 4 / 3
    assert found.checkpoint == 2 * 4 * 4 * sum(p.numel() for p in module.parameters())  # gathered, and a copy of it


def test_what_cannot_be_trained_in_shares_cannot_be_planned_so() -> None:
    with pytest.raises(ConfigError, match="worldmodel needs its whole network"):
        plan(objective=("worldmodel",), sharding="fsdp", processes=2, **SMALL)
    with pytest.raises(ConfigError, match="log_scale is a scalar"):
        plan(objective=("contrastive",), sharding="fsdp", processes=2, **SMALL)


def test_only_options_that_matter_are_taken() -> None:
    answer = CliRunner().invoke(group, ["plan", "--help"])
    assert not [flag for flag in ("--clip", "--mirror", "--divergence", "--checkpoint-every", "--lr", "--warmup")
                if flag in answer.output]
    found = CliRunner().invoke(group, ["plan", "--objective", "mae", "--dim", "32", "--heads", "2", "--json"])
    assert set(json.loads(found.stdout)["objectives"]) == {"mae"}
