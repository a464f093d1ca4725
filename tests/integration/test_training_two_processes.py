"""`torchrun --nproc-per-node 2` on CPU (gloo) computes what one process computes at the same global batch.

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
for stage, options in zip((train, cache, distill), json.loads(sys.argv[1])):
    stage(**options)
"""


def _stages(home: Path, out: Path) -> list[dict[str, Any]]:
    """Options of the three stages; both runs cache and distil from the teacher of one process."""
    common = {"data": str(home / "data"), "teacher": str(home / "one/teacher")}
    return [
        {"data": common["data"], "out": str(out / "teacher"), "steps": 12, **TEACHER},
        {**common, "out": str(out / "features"), "per_shard": 8, "precision": "fp32"},
        {**common, "features": str(home / "one/features"), "out": str(out / "student"), "labels": 0.5,
         "labelled_share": 0.5, **STUDENT},
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, and the artifacts of `one` and of `two` processes."""
    folder = tmp_path_factory.mktemp("processes")
    write_scenes(folder / "data")
    teacher, features, student = _stages(folder, folder / "one")
    train(**teacher)
    cache(**features)
    distill(**student)
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(folder / "script.py"), json.dumps(_stages(folder, folder / "two"))]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def _log(artifact: Artifact) -> list[dict[str, float]]:
    return [json.loads(line) for line in artifact.path("log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["teacher", "student"])
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
