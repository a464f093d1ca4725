"""Objectives on the built-in teacher of images: those that one picture is enough for train it, the others refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fmdeploy.artifact import open_artifact
from fmdeploy.data.from_arrays import write_arrays
from fmdeploy.errors import ConfigError
from fmdeploy.models.image_backbone import tokens_a_side
from fmdeploy.models.saved import load_model
from fmdeploy.models.tokens import backbone_of
from fmdeploy.tasks.image_classification import ImageClassification
from fmdeploy.teacher.adapt.adapt import adapt
from fmdeploy.teacher.probe.probe import probe
from fmdeploy.teacher.train import train

FAST: dict[str, Any] = {"task": "image-classification", "batch": 8, "precision": "fp32", "dim": 16, "depth": 1, "heads": 2}
SETTINGS = {"mae": ("mae.width=16", "mae.heads=2"), "jepa": ("jepa.width=16", "jepa.heads=2", "jepa.watch_every=2"),
            "selfdistill": ("selfdistill.prototypes=4", "selfdistill.token_prototypes=8", "selfdistill.memory=16")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 pictures of one stripe; its place is the class."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 10, 64)
    image = (rng.random((64, 3, 32, 32)) * 0.2).astype(np.float32)
    for number, place in enumerate(label):
        image[number, :, :, 3 * place : 3 * place + 3] += 0.7
    splits = {"train": np.arange(40), "val": np.arange(40, 48), "test": np.arange(48, 64)}
    out = tmp_path_factory.mktemp("images") / "data"
    write_arrays(out, {"image": image, "label": label}, splits)
    return out


@pytest.mark.parametrize("objective", SETTINGS)
def test_what_one_picture_is_enough_for_trains_the_backbone(data: Path, tmp_path: Path, objective: str) -> None:
    teacher = train(data=data, out=tmp_path / "t", objective=(objective,), set=SETTINGS[objective], steps=4, **FAST)
    loaded = load_model(teacher)
    torch.manual_seed(0)
    fresh = ImageClassification().teacher({name: FAST[name] for name in ("dim", "depth", "heads")}).state_dict()
    moved = {name for name, value in loaded.module.state_dict().items() if not torch.equal(value, fresh[name])}
    assert moved
    assert {name.partition(".")[0] for name in moved} == {"backbone"}
    assert not loaded.recipe.heads


def test_a_pre_trained_one_is_probed_tuned_and_adapted(data: Path, tmp_path: Path) -> None:
    pretrained = train(data=data, out=tmp_path / "t", objective=("mae",), set=SETTINGS["mae"], steps=2, **FAST).root
    probe(model=pretrained, data=data, out=tmp_path / "p", rungs=("linear", "knn"))
    found = open_artifact(tmp_path / "p").json("probe.json")["rungs"]
    assert all(found[rung]["value"] is not None for rung in ("linear", "knn"))
    tuned = train(data=data, out=tmp_path / "tuned", init=pretrained, task="image-classification", steps=2, batch=8,
                  precision="fp32", activation_checkpointing=True)
    assert tuned.json("metrics.json")["test"]["accuracy"] >= 0
    for method in ("lora", "adapter", "prompt", "head"):
        adapted = adapt(teacher=tuned.root, data=data, out=tmp_path / method, method=method, steps=1, batch=8,
                        precision="fp32")
        assert adapted.json("metrics.json")["trained"] > 0


@pytest.mark.parametrize(("objective", "message"), [
    ("flow", "needs the frames after each sample"), ("worldmodel", "found 16 codes, 8 tokens a side of 32 cells"),
    ("contrastive", "contrasts one sensor with another, and this task has only one"),
])
def test_what_needs_more_than_one_picture_is_refused(data: Path, tmp_path: Path, objective: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        train(data=data, out=tmp_path / "t", objective=(objective,), steps=1, **FAST)
    assert message in str(refused.value)
    assert not (tmp_path / "t").exists()


def test_tokens_see_their_own_pixels_first_and_any_may_be_left_out() -> None:
    torch.manual_seed(0)
    teacher = ImageClassification().teacher({"dim": 16, "depth": 1}).eval()
    backbone, image = backbone_of(teacher, where="test"), torch.rand(2, 3, 32, 32)
    assert (backbone.side, backbone.patch, backbone.dim) == (8, 4, 16)
    whole = backbone.tokens(image)
    assert whole.shape == (2, 65, 16)
    everything = torch.arange(64).expand(2, -1)
    assert torch.allclose(backbone.tokens(image, keep_BK=everything), whole, atol=1e-5)
    assert backbone.tokens(image, keep_BK=everything[:, :7]).shape == (2, 8, 16)


@pytest.mark.parametrize(("width", "side"), [(8, 4), (16, 8), (28, 7), (31, 31), (32, 8), (64, 8), (96, 8), (224, 14), (1, 1)])
def test_any_square_image_is_cut_evenly(width: int, side: int) -> None:
    assert tokens_a_side(width) == side
    task = ImageClassification()
    task.image_shape = (1, width, width)
    if width < 64:
        assert task.teacher({"dim": 16, "depth": 1}).eval()(torch.rand(2, 1, width, width)).shape == (2, 10)


def test_an_oblong_image_needs_a_teacher_of_its_own() -> None:
    task = ImageClassification()
    task.image_shape = (3, 32, 64)
    with pytest.raises(ConfigError, match="takes square images"):
        task.teacher({})
