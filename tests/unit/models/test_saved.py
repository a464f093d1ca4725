"""A trained network in an artifact: round trip, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fmdeploy.artifact import Artifact
from fmdeploy.config import StageConfig
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ConfigError, ModelFileError
from fmdeploy.manifest import Kind
from fmdeploy.models.saved import load_model, save_model
from fmdeploy.task import load_task

TASK = "image-classification"
OPTIONS = {"width": 16, "blocks": 2}


def _artifact(out: Path, *, recipe: dict[str, object] | None = None) -> tuple[Artifact, nn.Module]:
    module = load_task(TASK).student("cnn", OPTIONS)

    def build(draft: Draft) -> None:
        save_model(draft, module, task=TASK, role="student", name="cnn", options=OPTIONS)
        if recipe is not None:
            stored = json.loads(draft.path("model.json").read_text())
            draft.write_json("model.json", stored | recipe)

    return produce(out, Kind.STUDENT, stage="test", config=StageConfig(), inputs={}, build=build), module


def test_the_recipe_names_every_size_so_a_new_default_orphans_nothing(tmp_path: Path) -> None:
    module = load_task(TASK).student("cnn", {})
    produce(tmp_path / "s", Kind.STUDENT, stage="test", config=StageConfig(), inputs={}, build=lambda draft: save_model(
        draft, module, task=TASK, role="student", name="cnn", options={}))
    assert json.loads((tmp_path / "s/model.json").read_text())["options"] == {"width": 16, "blocks": 1}
    bev = load_task("bev-occupancy")
    for built in (bev.teacher({}), bev.student("cnn", {}), bev.student("vit", {})):
        name, options = built.rebuild  # type: ignore[misc]
        again = bev.student(name, options) if name else bev.teacher(options)
        shapes = {key: value.shape for key, value in again.state_dict().items()}
        assert shapes == {key: value.shape for key, value in built.state_dict().items()}


def test_weights_and_sizes_come_back(tmp_path: Path) -> None:
    artifact, module = _artifact(tmp_path / "s")
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    loaded = load_model(artifact)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not loaded.module.training
    assert loaded.recipe.parameters == sum(p.numel() for p in module.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], value)


@pytest.mark.parametrize(("recipe", "error", "message"), [
    ({"options": {"width": 32, "blocks": 2}}, ModelFileError, "weights do not fit the network"),
    ({"io_digest": "0" * 64}, ModelFileError, "made for another input or output"),
    ({"name": "resnet"}, ConfigError, "no such student"),
    ({"surprise": 1}, ConfigError, "unknown key 'surprise'"),
    ({"added": [{"kind": "adapter", "options": {}}]}, ConfigError, r"model\.json: 'added\.0'.*options of 'adapter' are width"),
    ({"added": [{"kind": "prompt", "options": {"prompts": 4}}]}, ConfigError, "are prompts .int., deep .bool."),
    ({"added": [{"kind": "prompt", "options": {"prompts": True, "deep": True}}]}, ConfigError, "are prompts .int."),
    ({"added": [{"kind": "adapter", "options": {"width": 4, "depth": 1}}]}, ConfigError, "are width"),
    ({"added": [{"kind": "adapter", "options": {"width": 0}}]}, ConfigError, "from 1 to 65536"),
    ({"added": [{"kind": "adapter", "options": {"width": 10**12}}]}, ConfigError, "from 1 to 65536"),
    ({"added": [{"kind": "lora", "options": {}}]}, ConfigError, r"added\.0\.kind"),
    ({"added": [{"kind": "adapter", "options": {"width": 4}}]}, ConfigError, "no transformer"),
    ({"added": {"kind": "adapter"}}, ConfigError, "'added'"),
])
def test_a_recipe_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, recipe: dict[str, object], error: type[Exception], message: str
) -> None:
    artifact, _ = _artifact(tmp_path / "s", recipe=recipe)
    with pytest.raises(error, match=message) as caught:
        load_model(artifact)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["text", ["text"], [[1]], [], None, 7])
def test_a_recipe_that_is_no_object_is_refused_in_one_line(tmp_path: Path, content: object) -> None:
    made = produce(tmp_path / "s", Kind.STUDENT, stage="test", config=StageConfig(), inputs={},
                   build=lambda draft: draft.write_json("model.json", content))
    with pytest.raises(ConfigError, match=r"model\.json") as caught:
        load_model(made)
    assert "\n" not in str(caught.value)
