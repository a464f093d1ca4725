"""`teacher adapt` and `teacher merge`: the base stays, few parameters change, and merged equals unmerged."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.config import load_config
from fmdeploy.data.format import open_dataset
from fmdeploy.errors import ArtifactError, ConfigError
from fmdeploy.evaluate.evaluation import Evaluation
from fmdeploy.iospec import IOSpec
from fmdeploy.manifest import Kind
from fmdeploy.models.additions import Addition, add, additions_of
from fmdeploy.models.saved import LoadedModel, load_model
from fmdeploy.task import load_task
from fmdeploy.teacher.adapt.adapt import adapt
from fmdeploy.teacher.adapt.config import AdaptConfig
from fmdeploy.teacher.adapt.lora import add_lora, fold_lora
from fmdeploy.teacher.adapt.methods import Plan, apply_plan
from fmdeploy.teacher.adapt.store import load_adapted
from fmdeploy.teacher.adapt.training import Adaptation
from fmdeploy.teacher.cache import cache
from fmdeploy.teacher.merge import merge
from fmdeploy.teacher.train import train
from fmdeploy.training.batches import SupervisedBatches
from fmdeploy.training.mixture.options import mix
from support.recomputing import watch_recomputing
from support.training_data import TEACHER, write_scenes

METHODS = ("lora", "adapter", "prompt", "bias-norm", "head")
FAST: dict[str, Any] = {"steps": 5, "batch": 4, "precision": "fp32", "lr": 2e-2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets, a teacher of the first, and an adapter of every method for the second."""
    folder = tmp_path_factory.mktemp("adapt")
    write_scenes(folder / "data")
    write_scenes(folder / "new", seed=5)
    train(data=folder / "data", out=folder / "teacher", steps=6, **TEACHER)
    for method in METHODS:
        adapt(teacher=folder / "teacher", data=folder / "new", out=folder / method, method=method, **FAST)
    return folder


def inputs_of(io: IOSpec, batch: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand((batch, *spec.shape), generator=generator) for spec in io.inputs]


@torch.no_grad()
def outputs(loaded: LoadedModel) -> torch.Tensor:
    found = loaded.module.eval()(*inputs_of(loaded.task.io))
    return torch.cat([value.flatten(1) for value in found], dim=1)


@pytest.mark.parametrize("method", METHODS)
def test_merged_equals_unmerged_and_both_differ_from_the_base(home: Path, method: str, tmp_path: Path) -> None:
    base, adapter = open_artifact(home / "teacher"), open_artifact(home / method, Kind.ADAPTER)
    before = base.path("model.safetensors").read_bytes()
    unmerged = outputs(load_adapted(base, adapter))
    merged = merge(teacher=home / "teacher", adapter=home / method, out=tmp_path / "merged")
    loaded = load_model(merged)
    assert (outputs(loaded) - unmerged).abs().max() <= 1e-5
    assert merged.json("metrics.json")["merge_error"] <= 1e-5
    assert (outputs(load_model(base)) - unmerged).abs().max() > 1e-4, "the adapter does nothing"
    assert base.path("model.safetensors").read_bytes() == before
    own, kept = set(load_model(base).module.state_dict()), set(loaded.module.state_dict())
    assert own == kept if method not in ("adapter", "prompt") else own < kept
    assert not any("peft" in type(module).__module__ for module in loaded.module.modules())


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_holds_what_it_trains_and_nothing_else(home: Path, method: str) -> None:
    base, adapter = open_artifact(home / "teacher"), open_artifact(home / method)
    metrics, tensors = adapter.json("metrics.json"), adapter.tensors("adapter.safetensors")
    assert metrics["trained"] == sum(array.size for array in tensors.values())
    assert metrics["params"] == sum(p.numel() for p in load_model(base).module.parameters())
    assert metrics["share"] == pytest.approx(metrics["trained"] / metrics["params"])
    assert adapter.inputs["teacher"].digest == base.digest
    if method in ("lora", "adapter", "prompt"):
        assert not set(tensors) & set(load_model(base).module.state_dict())
        assert all("lora_" in name or "adapter" in name or "prompt" in name for name in tensors)
    evaluation = Evaluation.load(adapter, "evaluation")
    assert evaluation.data == f"{open_dataset(home / 'new').digest}:test"


def test_lora_names_are_stable_and_its_start_changes_nothing(home: Path) -> None:
    loaded = load_model(open_artifact(home / "teacher"))
    names, before = list(loaded.module.state_dict()), outputs(loaded)
    plan = Plan(method="lora", options={"rank": 1, "alpha": 2.0, "convolutions": True, "targets": ()})
    trained = apply_plan(loaded, plan)
    assert (outputs(loaded) - before).abs().max() == 0
    assert trained == apply_plan(load_model(open_artifact(home / "teacher")), plan)
    with torch.no_grad():
        for name in trained:
            loaded.module.get_parameter(name).normal_(std=0.1)
    moved = outputs(loaded)
    fold_lora(loaded.module)
    assert list(loaded.module.state_dict()) == names
    assert (outputs(loaded) - moved).abs().max() <= 1e-5 * moved.abs().max().clamp_min(1)
    assert (moved - before).abs().max() > 0.01


def test_lora_is_seen_by_torchs_own_encoder_layer_in_evaluation() -> None:
    """Its fast path reads the weights of the layers that are wrapped."""
    layer = nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    module = nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)).eval()
    tokens = torch.rand(2, 9, 16)
    add_lora(module, rank=1, alpha=1.0, convolutions=False, targets=())
    with torch.no_grad():
        before = module(tokens)
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.normal_()
        moved = module(tokens)
        assert (moved - before).abs().max() > 1e-3
        assert (fold_lora(module)(tokens) - moved).abs().max() <= 1e-5 * moved.abs().max().clamp_min(1)


def test_a_copy_of_a_network_has_additions_of_its_own(home: Path) -> None:
    loaded = load_model(open_artifact(home / "teacher"))
    add(loaded.module, [Addition(kind="adapter", options={"width": 4}), Addition(kind="prompt", options={"prompts": 3, "deep": True})])
    twin = LoadedModel(loaded.task, loaded.recipe, copy.deepcopy(loaded.module))
    before = outputs(twin)
    with torch.no_grad():
        for parameter in loaded.module.parameters():
            parameter.zero_()
    assert torch.equal(outputs(twin), before)
    assert additions_of(twin.module) == additions_of(loaded.module)
    with torch.no_grad():
        for name, parameter in twin.module.named_parameters():
            if "adapter" in name or "prompt" in name:
                parameter.add_(0.5)
    assert not torch.equal(outputs(twin), before)


def test_a_merged_teacher_works_everywhere(home: Path, tmp_path: Path) -> None:
    merged = merge(teacher=home / "teacher", adapter=home / "adapter", out=tmp_path / "merged", data=home / "new")
    assert Evaluation.load(merged, "evaluation").data == f"{open_dataset(home / 'new').digest}:test"
    tuned = train(data=home / "new", init=merged.root, out=tmp_path / "tuned", steps=2, batch=4, precision="fp32")
    assert tuned.json("model.json")["added"] == merged.json("model.json")["added"] != []
    assert (outputs(load_model(tuned)) - outputs(load_model(merged))).abs().max() > 0
    assert cache(teacher=merged.root, data=home / "new", out=tmp_path / "features", precision="fp32").kind is Kind.FEATURES
    lora = adapt(teacher=merged.root, data=home / "data", out=tmp_path / "lora", method="lora", **FAST)
    assert merge(teacher=merged.root, adapter=lora.root, out=tmp_path / "both").json("metrics.json")["merge_error"] <= 1e-5
    again = adapt(teacher=merged.root, data=home / "data", out=tmp_path / "again", method="adapter", **FAST)
    twice = merge(teacher=merged.root, adapter=again.root, out=tmp_path / "twice")
    assert len(twice.json("model.json")["added"]) == 2
    assert (outputs(load_model(twice)) - outputs(load_adapted(merged, again))).abs().max() <= 1e-5
    lineage = twice.inputs["teacher"].inputs
    assert set(lineage) == {"teacher", "adapter", "evaluation_data"}


def test_carried_evaluations_are_those_of_the_adapter(home: Path, tmp_path: Path) -> None:
    merged = merge(teacher=home / "teacher", adapter=home / "lora", out=tmp_path / "m")
    for name in ("evaluation.safetensors", "validation.json", "examples.safetensors", "calibration_guard.json"):
        assert merged.path(name).read_bytes() == (home / "lora" / name).read_bytes()
    assert merged.json("metrics.json")["test"] == open_artifact(home / "lora").json("metrics.json")["test"]


def test_adapters_of_two_sites_stand_side_by_side_over_one_base(home: Path) -> None:
    base = open_artifact(home / "teacher")
    sites = [outputs(load_adapted(base, open_artifact(home / name))) for name in ("lora", "prompt", "lora")]
    assert torch.equal(sites[0], sites[2])
    assert not torch.equal(sites[0], sites[1])


def test_another_base_is_refused(home: Path, tmp_path: Path) -> None:
    other = train(data=home / "data", out=tmp_path / "other", steps=1, **TEACHER)
    with pytest.raises(ArtifactError, match="was trained on another teacher"):
        load_adapted(other, open_artifact(home / "lora"))
    with pytest.raises(ArtifactError, match="was trained on another teacher"):
        merge(teacher=other.root, adapter=home / "lora", out=tmp_path / "merged")


def test_the_effect_on_both_domains_is_measured(home: Path, tmp_path: Path) -> None:
    adapter = adapt(teacher=home / "teacher", data=home / "new", out=tmp_path / "a", method="bias-norm", also=("head",),
                    source_data=home / "data", replay=[home / "data"], replay_share=0.5, labels=0.5, **FAST)
    metrics = adapter.json("metrics.json")
    base = open_artifact(home / "teacher")
    before = Evaluation.load(adapter, "source_evaluation_before")
    metric = load_task("bev-occupancy").metrics()[0]
    assert metrics["source_before"] == pytest.approx(Evaluation.load(base, "evaluation").value(metric))
    assert metrics["source_before"] == pytest.approx(before.value(metric))
    after = Evaluation.load(adapter, "source_evaluation").value(metric)
    assert metrics["source_fall"]["value"] == pytest.approx((metrics["source_before"] - after) / metrics["source_before"])
    assert metrics["target_after"] == pytest.approx(metrics["test"]["iou"])
    assert metrics["labels"] == {"samples": 18, "of": 36}
    assert set(adapter.inputs) == {"teacher", "data", "replay0", "evaluation_data"}
    assert metrics["teacher_data"] == {open_dataset(home / "data").digest: "disjoint"}


def test_the_same_request_gives_the_same_digest_however_often_it_is_killed(home: Path, tmp_path: Path) -> None:
    options = {"teacher": str(home / "teacher"), "data": str(home / "new"), "replay": str(home / "data"), "steps": "40",
               "batch": "4", "precision": "fp32", "checkpoint-every": "2"}
    command = [sys.executable, "-m", "fmdeploy", "teacher", "adapt", *[x for k, v in options.items() for x in (f"--{k}", v)]]
    child = subprocess.Popen([*command, "--out", str(tmp_path / "killed")])
    while child.poll() is None and not list((tmp_path / ".killed.partial").glob("work/adapter/*.safetensors")):
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "killed").exists()
    given: dict[str, Any] = {"teacher": home / "teacher", "data": home / "new", "replay": [home / "data"], "steps": 40,
                             "batch": 4, "precision": "fp32"}
    resumed = adapt(out=tmp_path / "killed", checkpoint_every=2, **given)
    assert resumed.manifest.environment["training"]["steps"] < 40, "it began anew"
    assert resumed.digest == adapt(out=tmp_path / "whole", **given).digest


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_activations_are_recomputed_where_that_is_wanted_and_nothing_else_changes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    ran = watch_recomputing(monkeypatch)
    saving = {"out": tmp_path / "a", "method": method, "activation_checkpointing": True, **FAST}
    adapter = adapt(teacher=home / "teacher", data=home / "new", **saving)
    assert len(ran) >= FAST["steps"]
    assert adapter.digest == open_artifact(home / method).digest


def test_mixture_and_replay_are_those_of_the_other_stages(home: Path, tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text("importance = true\n[weights.scenario]\nmerge = 3.0\n")
    adapter = adapt(teacher=home / "teacher", data=home / "new", out=tmp_path / "a", method="bias-norm", labels=0.5,
                    mixture=tmp_path / "m.toml", replay=[home / "data", home / "data"], replay_share=0.75,
                    replay_samples=6, **FAST)
    config = adapter.manifest.config
    assert config["mixture"]["weights"] == {"scenario": {"merge": 3.0}}
    assert (config["replay_share"], config["replay_samples"]) == (0.75, 6)
    assert set(adapter.inputs) == {"teacher", "data", "replay0", "replay1"}
    plain = open_artifact(home / "lora").manifest.config
    assert not {name for name in plain if name.startswith("replay") or name == "mixture"}
    assert plain["rank"] == 1


def test_replay_gives_old_samples_their_share_of_the_draws(home: Path) -> None:
    task, config = load_task("bev-occupancy"), AdaptConfig(
        teacher=home, data=home, out=home, replay=(home,), replay_share=0.75, batch=8, labels=0.5, mirror=False)
    new, old = (open_dataset(home / name) for name in ("new", "data"))
    mixture = mix(config, task, new, (old,), config.seed)
    index = mixture.labelled(config.labels, config.label_seed)
    assert index is not None
    assert mixture.supervision(index) == {"samples": 18, "of": 36}
    batches = SupervisedBatches(task, mixture, config, index)
    known = {row.tobytes() for row in task.samples(old, "train").batch(np.arange(36))[0]["lidar"]}
    seen = [row.tobytes() in known for step in range(27) for row in batches(step, 0)["inputs"]["lidar"]]
    assert np.mean(seen) == pytest.approx(0.75, abs=0.01)  # four epochs of 54 draws


def test_batch_norm_keeps_the_statistics_of_the_base() -> None:
    network = nn.Sequential(nn.Conv2d(20, 4, 1), nn.BatchNorm2d(4))
    whole = Adaptation(load_task("bev-occupancy"), network).train()
    assert whole.training
    assert not network[1].training


@pytest.mark.parametrize(("options", "message"), [
    ({"method": "prompt", "rank": 3}, "rank is no option of the method prompt"),
    ({"method": "lora", "width": 3}, "width is no option"),
    ({"method": "head", "also": ("head",)}, "repeats"),
    ({"replay_share": 0.5}, "replay_share needs --replay"), ({"replay_samples": 5}, "replay_samples needs --replay"),
])
def test_options_of_other_methods_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(AdaptConfig, {"teacher": "t", "data": "d", "out": "o", **options})


def test_what_cannot_be_adapted_is_refused(home: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"teacher": home / "teacher", "data": home / "new", "out": tmp_path / "a", **FAST}
    with pytest.raises(ConfigError, match="no layer that takes a low-rank update.*nowhere"):
        adapt(method="lora", targets=("nowhere",), **options)
    with pytest.raises(ConfigError, match="no parameters of that kind"):
        adapt(method="head", targets=("nowhere",), **options)
    pretrained = merge(teacher=home / "teacher", adapter=home / "prompt", out=tmp_path / "prompted")
    with pytest.raises(ConfigError, match="has prompts already"):
        adapt(method="prompt", **{**options, "teacher": pretrained.root})


def test_kinds_are_checked(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="another kind"):
        adapt(teacher=home / "lora", data=home / "new", out=tmp_path / "x")
    found: Artifact = open_artifact(home / "lora")
    assert found.kind is Kind.ADAPTER
