"""`torchrun --nproc-per-node 2` on CPU (gloo) computes what one process computes at the same global batch, sharded or not.

Tolerance: sums over a batch are added in another order, and AdamW divides by a root of tiny squares, which magnifies
the difference. In fp32 after 12 steps, losses agree to 1e-4, the first gradient to 1e-4, and each tensor (root mean
square) to 5e-3 of itself plus 2 % of the way AdamW can move a weight in these steps (the sum of the learning rates).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.distill.distill import distill
from fmdeploy.teacher.cache import cache
from fmdeploy.teacher.features import map_safetensors
from fmdeploy.teacher.train import train
from support.training_data import STUDENT, TEACHER, write_scenes

SCRIPT = """
import json, sys
from fmdeploy.distill.distill import distill
from fmdeploy.teacher.cache import cache
from fmdeploy.teacher.train import train
from fmdeploy.teacher.objectives.pretraining import PretrainingBatches

stages, sharded, cut, stop = json.loads(sys.argv[1])
for stage, options in zip((train, cache, distill), stages):
    stage(**options)
train(**sharded)

class Stop(Exception):
    pass

call = PretrainingBatches.__call__
def stopping(self, step, part):
    if step == stop:
        raise Stop
    return call(self, step, part)

PretrainingBatches.__call__ = stopping
try:
    train(**cut)
except Stop:
    pass
else:
    raise SystemExit("it was not cut")
"""
STOP = 9


def _stages(home: Path, out: Path) -> list[dict[str, Any]]:
    """Options of the three stages; both runs cache and distil from the teacher of one process."""
    common = {"data": str(home / "data"), "teacher": str(home / "one/teacher")}
    return [
        {"data": common["data"], "out": str(out / "teacher"), "steps": 12, **TEACHER},
        {**common, "out": str(out / "features"), "per_shard": 8, "precision": "fp32"},
        {**common, "features": str(home / "one/features"), "out": str(out / "student"), "labels": 0.5,
         "labelled_share": 0.5, **STUDENT},
    ]


def _sharded(home: Path, name: str) -> dict[str, Any]:
    """A teacher with averaged weights whose state is spread over the processes."""
    return {"data": str(home / "data"), "out": str(home / name), "steps": 12, "sharding": "fsdp", "ema": 0.9,
            "checkpoint_every": 4, **TEACHER}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, and the artifacts of `one` and of `two` processes; `cut` stopped after step 8."""
    folder = tmp_path_factory.mktemp("processes")
    write_scenes(folder / "data")
    teacher, features, student = _stages(folder, folder / "one")
    train(**teacher)
    cache(**features)
    distill(**student)
    train(**_sharded(folder, "one/whole") | {"sharding": "none"})
    (folder / "script.py").write_text(SCRIPT)
    work = [_stages(folder, folder / "two"), _sharded(folder, "two/whole"), _sharded(folder, "cut"), STOP]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(folder / "script.py"), json.dumps(work)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def _log(artifact: Artifact) -> list[dict[str, float]]:
    return [json.loads(line) for line in artifact.path("log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["teacher", "student", "whole"])
def test_two_processes_train_the_same_network(home: Path, kind: str) -> None:
    one, two = open_artifact(home / "one" / kind), open_artifact(home / "two" / kind)
    assert _log(one)[0]["grad_norm"] == pytest.approx(_log(two)[0]["grad_norm"], rel=1e-4)
    for ours, theirs in zip(_log(one), _log(two), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), ours["step"]
    way = sum(record["lr"] for record in _log(one))
    weights, others = one.tensors("model.safetensors"), two.tensors("model.safetensors")
    assert set(weights) == set(others)
    for name, value in weights.items():
        difference = (value - others[name]).astype(np.float64)
        size = np.sqrt(np.square(value.astype(np.float64)).mean())
        assert np.sqrt(np.square(difference).mean()) <= 0.02 * way + 5e-3 * size, name
    assert one.json("metrics.json")["test"]["soft_iou"] == pytest.approx(
        two.json("metrics.json")["test"]["soft_iou"], rel=1e-2
    )


@pytest.mark.slow
def test_two_processes_share_the_shards_of_a_cache(home: Path) -> None:
    one, two = open_artifact(home / "one/features"), open_artifact(home / "two/features")
    assert set(one.manifest.files) == set(two.manifest.files)
    for name in one.manifest.files:
        if name.startswith("features/"):
            ours, theirs = map_safetensors(one.path(name)), map_safetensors(two.path(name))
            for key in ours:
                np.testing.assert_allclose(ours[key], theirs[key], rtol=2e-3, atol=1e-3)


@pytest.mark.slow
def test_sharding_is_told_and_leaves_an_ordinary_artifact(home: Path) -> None:
    one, two = open_artifact(home / "one/whole"), open_artifact(home / "two/whole")
    assert two.manifest.environment["training"]["sharding"] == "fsdp"
    assert two.manifest.environment["training"]["processes"] == 2
    assert two.manifest.config == one.manifest.config, "how it ran is no part of what it is"
    assert {name: value.shape for name, value in one.tensors("model.safetensors").items()} == {
        name: value.shape for name, value in two.tensors("model.safetensors").items()}


@pytest.mark.slow
def test_a_checkpoint_of_two_that_share_is_gone_on_from_by_one_that_does_not(home: Path) -> None:
    """Whole tensors of weights, optimiser state and average: the second half equals that of the run that was not cut."""
    folder = home / ".cut.partial"
    assert [path.name for path in sorted(folder.rglob("checkpoint-*"))][-1] == "checkpoint-00000008.safetensors"
    train(**_sharded(home, "cut") | {"sharding": "none"})
    resumed, whole = open_artifact(home / "cut"), open_artifact(home / "two/whole")
    assert resumed.manifest.environment["training"]["steps"] == 4
    assert _log(resumed)[:8] == _log(whole)[:8]
    for ours, theirs in zip(_log(resumed)[8:], _log(whole)[8:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["lr"] == theirs["lr"]
    for name, value in resumed.tensors("model.safetensors").items():
        np.testing.assert_allclose(value, whole.tensors("model.safetensors")[name], rtol=1e-2, atol=2e-3)
