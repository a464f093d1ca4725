"""Runs of five objectives together: killed and resumed to the same bytes, and two processes compute what one does.

Together, because each process takes seconds to start. The world model needs other data: test_worldmodel.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.teacher.train import train
from support.processes import FMDEPLOY
from support.training_data import TEACHER, write_scenes

OBJECTIVES = ("mae", "jepa=0.5", "selfdistill", "contrastive=0.5", "flow=2")
SETTINGS = ("mae.width=16", "mae.heads=2", "jepa.width=16", "jepa.heads=2", "jepa.depth=1", "jepa.watch_every=4",
            "selfdistill.prototypes=4", "selfdistill.memory=21", "selfdistill.token_prototypes=16",
            "contrastive.queue=12", "contrastive.hidden=16", "flow.width=16")
LOGGED = {"mae.lidar", "mae.camera", "jepa.predict", "jepa.feature_std", "jepa.effective_rank", "selfdistill.frame",
          "selfdistill.token", "selfdistill.cell", "selfdistill.feature_std", "contrastive.frame", "contrastive.token",
          "contrastive.temperature", "contrastive.effective_rank", "flow.velocity"}
OPTIONS: dict[str, Any] = {"steps": 24, "checkpoint_every": 5, **TEACHER}
PATIENCE_S = 240.0
SCRIPT = """
import json, sys
from fmdeploy.teacher.train import train
train(**json.loads(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and the TEACHER `whole`."""
    folder = tmp_path_factory.mktemp("runs")
    write_scenes(folder / "data")
    train(data=folder / "data", out=folder / "whole", objective=OBJECTIVES, set=SETTINGS, **OPTIONS)
    return folder


def _log(artifact: Artifact) -> list[dict[str, float]]:
    return [json.loads(line) for line in artifact.path("log.jsonl").read_text().splitlines()]


def _flags(home: Path, out: Path) -> list[str]:
    options = {"data": home / "data", "out": out, **OPTIONS}
    flags = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), str(value))]
    return [*flags, *(part for text in OBJECTIVES for part in ("--objective", text)),
            *(part for text in SETTINGS for part in ("--set", text))]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(home: Path, tmp_path: Path) -> None:
    """Queues, centres, moving averages, their order and the temperatures survive `kill -9`."""
    command = [*FMDEPLOY, "teacher", "train", *_flags(home, tmp_path / "t")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        log, deadline = tmp_path / ".t.partial/log.jsonl", time.monotonic() + PATIENCE_S
        while process.poll() is None and not (log.is_file() and log.read_bytes().count(b"\n") >= 7):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        assert process.poll() is None, "the run was over before it could be killed"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "t").exists()
    resumed = train(data=home / "data", out=tmp_path / "t", objective=OBJECTIVES, set=SETTINGS, **OPTIONS)
    whole = open_artifact(home / "whole")
    assert resumed.manifest.environment["training"]["steps"] < OPTIONS["steps"], "it began anew"
    assert resumed.digest == whole.digest
    assert _log(resumed) == _log(whole)
    assert resumed.json("model.json")["heads"] is False


@pytest.mark.slow
def test_two_processes_compute_what_one_does(home: Path, tmp_path: Path) -> None:
    """Tolerances as in tests/integration/test_training_two_processes.py; few steps, as rounding grows from step to step."""
    (tmp_path / "script.py").write_text(SCRIPT)
    options = {"data": str(home / "data"), "objective": OBJECTIVES, "set": SETTINGS, **OPTIONS, "steps": 6}
    one = train(out=tmp_path / "one", **options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(tmp_path / "script.py"), json.dumps({**options, "out": str(tmp_path / "two")})]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    two = open_artifact(tmp_path / "two")
    assert set(_log(one)[0]) >= LOGGED
    assert _log(one)[0]["grad_norm"] == pytest.approx(_log(two)[0]["grad_norm"], rel=1e-4)
    for ours, theirs in zip(_log(one), _log(two), strict=True):
        for key in set(ours) - {"grad_norm"}:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-3, abs=1e-4), (key, ours["step"])
    way = sum(record["lr"] for record in _log(one))
    weights, others = one.tensors("model.safetensors"), two.tensors("model.safetensors")
    for name, value in weights.items():
        difference = (value - others[name]).astype(np.float64)
        size = np.sqrt(np.square(value.astype(np.float64)).mean())
        assert np.sqrt(np.square(difference).mean()) <= 0.02 * way + 5e-3 * size, name
