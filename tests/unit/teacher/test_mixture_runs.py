"""Mixture and replay through the command: what goes into the manifest, and a run that is killed and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.data.format import open_dataset
from fmdeploy.errors import ConfigError, LeakageError
from fmdeploy.task import load_task
from fmdeploy.teacher.train import train
from fmdeploy.training import loop
from fmdeploy.training.mixture.options import MixtureConfig, mix
from support.training_data import TEACHER, write_scenes


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    write_scenes(root / "new", sequences=16)
    write_scenes(root / "old", seed=1, sequences=16)
    (root / "merge.toml").write_text('importance = true\n[weights.scenario]\nmerge = 3.0\n')
    return root


def run(home: Path, out: Path, **options: Any) -> Any:
    return train(data=home / "new", out=out, **{**TEACHER, "steps": 6, "checkpoint_every": 2, **options})


def test_the_manifest_says_what_was_seen(home: Path, tmp_path: Path) -> None:
    made = run(home, tmp_path / "t", mixture=home / "merge.toml", replay=[home / "old"], replay_share=0.5, replay_samples=8)
    config = made.manifest.config
    assert config["mixture"]["weights"] == {"scenario": {"merge": 3.0}}
    assert (config["replay_share"], config["replay_samples"]) == (0.5, 8)
    assert set(made.inputs) == {"data", "replay0"}
    plain = run(home, tmp_path / "plain").manifest.config
    assert "replay_share" not in plain
    assert "mixture" not in plain


def test_weights_of_metadata_hold_in_old_domains_too(home: Path, tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text("[weights.seed]\n0 = 3.0\n")  # a key that no slice has; each domain has a seed 0
    config = MixtureConfig(mixture=tmp_path / "m.toml", replay=(home / "old",), replay_share=0.5)
    mixed = mix(config, load_task("bev-occupancy"), open_dataset(home / "new"), [open_dataset(home / "old")], seed=0)
    assert mixed.rate_N is not None
    names = mixed.samples.ids
    for domain in ("new", "old0"):
        first_N = np.array([name.startswith((f"{domain}:s000/", f"{domain}:s001/")) for name in names])
        others_N = np.array([name.startswith(f"{domain}:") for name in names]) & ~first_N
        assert mixed.rate_N[first_N].mean() == pytest.approx(3 * mixed.rate_N[others_N].mean())


def test_a_natural_mixture_changes_nothing(home: Path, tmp_path: Path) -> None:
    (tmp_path / "flat.toml").write_text("[weights.scenario]\nmerge = 1.0\n")
    plain, flat = run(home, tmp_path / "a"), run(home, tmp_path / "b", mixture=tmp_path / "flat.toml")
    assert plain.path("model.safetensors").read_bytes() == flat.path("model.safetensors").read_bytes()
    for text in ("[weights.planet]\nmars = 1.0\n", 'axes = ["planet"]\n'):  # misspelled, though it would change nothing
        (tmp_path / "odd.toml").write_text(text)
        with pytest.raises(ConfigError, match="no sample has such an axis"):
            run(home, tmp_path / "c", mixture=tmp_path / "odd.toml")


def test_a_killed_run_goes_on_to_the_same_artifact(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"mixture": home / "merge.toml", "replay": [home / "old"]}
    whole = run(home, tmp_path / "whole", **options)
    step = loop.Run.step

    def dying(self: loop.Run, number: int, take: Any) -> None:
        if number == 5:
            raise KeyboardInterrupt
        step(self, number, take)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            run(home, tmp_path / "again", **options)
    assert run(home, tmp_path / "again", **options).digest == whole.digest


def test_representation_is_learnt_at_natural_frequency(home: Path, tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text("[weights.scenario]\nmerge = 3.0\n")
    with pytest.raises(ConfigError, match="natural frequency.*representation"):
        run(home, tmp_path / "t", mixture=tmp_path / "m.toml", objective=["mae"])
    assert not (tmp_path / "t").exists()
    (tmp_path / "m.toml").write_text('representation = "mixture"\n[weights.scenario]\nmerge = 3.0\n')
    assert run(home, tmp_path / "t", mixture=tmp_path / "m.toml", objective=["mae"], steps=2).has("model.safetensors")


def test_importance_weights_without_labels_are_refused(home: Path, tmp_path: Path) -> None:
    text = (home / "merge.toml").read_text()
    (tmp_path / "m.toml").write_text(f'representation = "mixture"\n{text}')
    with pytest.raises(ConfigError, match="importance weights belong to the loss against labels"):
        run(home, tmp_path / "t", mixture=tmp_path / "m.toml", objective=("mae",))


def test_an_old_domain_that_holds_what_is_judged_is_refused(home: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "longer", sequences=32)  # the same simulations and more: the split falls later
    with pytest.raises(LeakageError, match=r"longer: the train split holds 4 of the sequences .*new holds out.*s012") as caught:
        run(home, tmp_path / "t", replay=[tmp_path / "longer"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "t").exists()
