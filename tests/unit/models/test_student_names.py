"""Students by name: built in, from a Hugging Face folder, from timm, from the user's own callable."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fmdeploy.errors import ConfigError, MissingDependencyError, ModelFileError
from fmdeploy.models import example_inputs, named_outputs
from fmdeploy.models.backbone import BackboneStudent
from fmdeploy.tasks.bev_occupancy import BevOccupancy

BEV = BevOccupancy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 in the Hugging Face format."""
    import transformers

    target = tmp_path_factory.mktemp("hf") / "dinov2"
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    transformers.Dinov2Model(config).save_pretrained(target)
    return target


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"student 'resnet': no such student \(expected cnn, vit, depthwise, hf:FOLDER"):
        BEV.student("resnet", {})


def test_an_option_that_the_student_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigError, match="unexpected keyword argument 'dim'"):
        BEV.student("cnn", {"dim": 3})


def test_a_folder_in_the_hugging_face_format_becomes_a_student(folder: Path) -> None:
    student = BEV.student(f"hf:{folder}", {})
    named = named_outputs(BEV.io, student(*example_inputs(BEV.io, 2)))
    assert {key: tuple(value.shape) for key, value in named.items()} == {"bev": (2, 5, 64, 64), "scene": (2, 8)}
    torch.stack([value.sum() for value in named.values()]).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


def test_it_starts_from_the_folders_weights_and_is_rebuilt_without_the_folder(folder: Path) -> None:
    from safetensors.torch import load_file

    student = BEV.student(f"hf:{folder}", {})
    stored = load_file(folder / "model.safetensors")["embeddings.cls_token"]
    assert torch.equal(student.state_dict()["backbone.model.embeddings.cls_token"], stored)
    assert isinstance(student, BackboneStudent)
    name, options = student.rebuild
    assert str(folder) not in name + repr(options)
    again = BEV.student(name, options)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in student.state_dict().items()}


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        BEV.student(f"hf:{tmp_path}", {})
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(ModelFileError, match="cannot be loaded"):
        BEV.student(f"hf:{tmp_path}", {})


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_timm_says_what_to_install() -> None:
    with pytest.raises(MissingDependencyError, match=r"fmdeploy\[timm\]"):
        BEV.student("timm:resnet10t", {})


def test_a_callable_of_the_users_becomes_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_students.py").write_text(
        "from torch import nn\ndef tiny(width=4) -> nn.Module:\n    return nn.Conv2d(8, width, 1)\nnot_a_module = dict\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    student = BEV.student("my_students:tiny", {"width": 7})
    assert isinstance(student, nn.Conv2d)
    assert student.out_channels == 7
    with pytest.raises(ConfigError, match="annotated to return one"):
        BEV.student("my_students:not_a_module", {})
    with pytest.raises(ConfigError, match="PYTHONPATH"):
        BEV.student("my_students:missing", {})
    sys.modules.pop("my_students")
