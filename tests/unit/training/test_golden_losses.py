"""The first twenty losses of a small teacher: a change to the loop, the order or the arithmetic shows here.

`pytest --update-golden` rewrites the file. Another CPU sums in another order, which moves a loss by some 1e-5 of itself;
another order of samples moves it by a hundredth.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmdeploy.teacher.train import train
from support.training_data import TEACHER, write_scenes


def test_default_options_give_the_losses_they_always_gave(tmp_path: Path, root: Path, update_golden: bool) -> None:
    write_scenes(tmp_path / "data", sequences=32)
    made = train(data=tmp_path / "data", out=tmp_path / "teacher", steps=20, seed=3, **TEACHER)
    losses = [json.loads(line)["loss"] for line in made.path("log.jsonl").read_text().splitlines()]
    golden = root / "tests/golden/losses.json"
    if update_golden:
        golden.write_text(json.dumps(losses) + "\n")
    assert losses == pytest.approx(json.loads(golden.read_text()), rel=1e-3)
