"""`teacher import`: what fits is loaded, what does not is named, and nothing in a checkpoint is ever run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fmdeploy.artifact import open_artifact
from fmdeploy.errors import ConfigError, InputError, ModelFileError
from fmdeploy.evaluate.evaluation import Evaluation
from fmdeploy.models.imported import FAMILIES, ImportedTeacher, make_encoder
from fmdeploy.models.saved import load_model
from fmdeploy.teacher.adapt.adapt import adapt
from fmdeploy.teacher.cache import cache
from fmdeploy.teacher.importing.fit import fit_to
from fmdeploy.teacher.importing.folder import resampled
from fmdeploy.teacher.importing.stage import import_teacher
from fmdeploy.teacher.train import train
from support.training_data import TEACHER, write_scenes

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "num_channels": 3}
SIZES: dict[str, Any] = {key: TEACHER[key] for key in ("dim", "depth", "heads", "stem_width", "width")}


def write_folder(folder: Path, family: str, **changes: Any) -> nn.Module:
    """A Hugging Face folder with random weights, as `save_pretrained` lays it out, without its progress bar."""
    values = {"model_type": family, **SMALL, **({} if family == "dinov2" else {"intermediate_size": 32}), **changes}
    torch.manual_seed(3)
    encoder = make_encoder(values, where=folder)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file({name: value.clone() for name, value in encoder.state_dict().items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return encoder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("importing")
    write_scenes(folder / "data", sequences=16)
    train(data=folder / "data", out=folder / "teacher", steps=2, **TEACHER)
    for family in FAMILIES:
        write_folder(folder / family, family)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_becomes_a_teacher_whose_features_are_the_encoders(home: Path, family: str, tmp_path: Path) -> None:
    artifact = import_teacher(source=home / family, out=tmp_path / "t")
    loaded = load_model(artifact)
    assert not loaded.recipe.heads
    teacher = loaded.module
    assert isinstance(teacher, ImportedTeacher)
    backbone = teacher.backbone
    assert (backbone.side, backbone.patch, backbone.dim) == (4, 16, 16)
    lidar, camera = torch.rand(2, 8, 64, 64), torch.rand(2, 12, 64, 64)
    encoder = make_encoder(json.loads((home / family / "config.json").read_text()) | {"mask_ratio": 0.0}
                           if family == "vit_mae" else json.loads((home / family / "config.json").read_text()), where=family)
    encoder.load_state_dict(write_state(home / family))
    image = torch.nn.functional.interpolate(backbone.entry(torch.cat((lidar, camera), 1)), (16, 16), mode="bilinear", align_corners=False)
    extra = {"noise": torch.arange(16.0).expand(2, -1)} if family == "vit_mae" else {}
    expected = encoder.eval()(pixel_values=image, **extra).last_hidden_state
    found = backbone.tokens(lidar, camera)
    assert found.shape == (2, 17, 16)
    assert torch.allclose(found if FAMILIES[family].has_class else found[:, 1:], expected, atol=1e-5)
    if family == "ijepa":
        assert torch.allclose(found[:, 0], expected.mean(1), atol=1e-5)
    keep = torch.tensor([[3, 0, 7], [1, 2, 15]])
    assert backbone.tokens(lidar, camera, keep_BK=keep).shape == (2, 4, 16)
    everything = torch.arange(16).expand(2, -1)
    assert torch.allclose(backbone.tokens(lidar, camera, keep_BK=everything), found, atol=1e-5)
    assert artifact.json("metrics.json")["imported"]["missing"] == 0
    assert artifact.digest == import_teacher(source=home / family, out=tmp_path / "again").digest


def write_state(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_an_imported_teacher_is_cached_fine_tuned_and_adapted(home: Path, tmp_path: Path) -> None:
    imported = import_teacher(source=home / "dinov2", out=tmp_path / "t", side=8)
    features = cache(teacher=imported.root, data=home / "data", out=tmp_path / "f", precision="fp32")
    assert features.json("metrics.json")["samples"] > 0
    with pytest.raises(ConfigError, match="was pre-trained only"):
        adapt(teacher=imported.root, data=home / "data", out=tmp_path / "a", steps=1, batch=4, precision="fp32")
    adapted = adapt(teacher=imported.root, data=home / "data", out=tmp_path / "a", steps=2, batch=4, precision="fp32", also=("head",))
    assert adapted.json("adapter.json")["heads"]
    tuned = train(data=home / "data", init=imported.root, out=tmp_path / "tuned", steps=2, batch=4, precision="fp32",
                  activation_checkpointing=True)
    assert tuned.json("model.json")["name"] == "hf:"
    assert load_model(tuned).recipe.heads
    assert Evaluation.load(tuned, "evaluation").ids


def test_positions_are_resampled_for_other_numbers_of_tokens() -> None:
    ramp = torch.linspace(0, 1, 4).repeat(4, 1).reshape(1, 16, 1)
    position = torch.cat((torch.full((1, 1, 1), 9.0), ramp), dim=1)
    finer = resampled(position, 4, 8, first=1)
    assert finer.shape == (1, 65, 1)
    assert finer[0, 0, 0] == 9
    rows = finer[0, 1:, 0].reshape(8, 8)
    assert torch.allclose(rows[0], rows[5], atol=1e-6)
    assert bool((rows[0].diff() > 0).all())
    assert torch.equal(resampled(position, 4, 4, first=1), position) or torch.allclose(resampled(position, 4, 4, first=1), position)


@pytest.mark.parametrize(("suffix", "prefix"), [("pt", "state_dict.teacher."), ("pth", "module."), ("safetensors", "")])
def test_a_checkpoint_of_the_tasks_own_teacher_comes_back(home: Path, suffix: str, prefix: str, tmp_path: Path) -> None:
    loaded = load_model(open_artifact(home / "teacher"))
    state = {prefix + name: value.clone() for name, value in loaded.module.state_dict().items()}
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save({"epoch": 3, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}, "net": state}, path)
    found = import_teacher(source=path, out=tmp_path / "t", data=home / "data", **SIZES)
    assert set(found.inputs) == {"evaluation_data"}, "it learnt nothing from it"
    again = load_model(found)
    assert again.recipe.heads
    for name, value in again.module.state_dict().items():
        assert torch.equal(value, loaded.module.state_dict()[name]), name
    notes = found.json("metrics.json")["imported"]
    assert notes["prefix"] == ("" if suffix == "safetensors" else "net.") + prefix
    assert notes["missing"] == notes["unexpected"] == 0
    assert found.json("metrics.json")["test"]["iou"] == pytest.approx(open_artifact(home / "teacher").json("metrics.json")["test"]["iou"])


def test_a_backbone_alone_gives_a_teacher_without_heads(home: Path, tmp_path: Path) -> None:
    backbone = load_model(open_artifact(home / "teacher")).module.get_submodule("backbone")
    torch.save({"teacher.backbone." + name: value for name, value in backbone.state_dict().items()}, tmp_path / "b.pt")
    found = import_teacher(source=tmp_path / "b.pt", out=tmp_path / "t", **SIZES)
    loaded = load_model(found)
    assert not loaded.recipe.heads
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, loaded.module.state_dict()[f"backbone.{name}"])


def test_an_encoder_checkpoint_takes_its_configuration_from_a_folder(home: Path, tmp_path: Path) -> None:
    encoder = write_folder(tmp_path / "ijepa", "ijepa")
    torch.save({"state_dict": {"module.encoder." + name: value for name, value in encoder.state_dict().items()}}, tmp_path / "c.pth")
    found = import_teacher(source=tmp_path / "c.pth", hf_config=tmp_path / "ijepa", out=tmp_path / "t")
    teacher = load_model(found).module
    assert isinstance(teacher, ImportedTeacher)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, teacher.backbone.encoder.state_dict()[name]), name
    assert found.json("metrics.json")["imported"]["prefix"] == "state_dict.module.encoder."


def test_what_does_not_fit_is_named_and_partial_takes_the_rest(home: Path, tmp_path: Path) -> None:
    state = load_model(open_artifact(home / "teacher")).module.state_dict()
    broken = {name: value for name, value in state.items() if name not in ("scene.weight", "scene.bias")}
    broken["head.0.bias"] = torch.zeros(3)
    broken["backbone.more"] = torch.zeros(1)
    broken["fc.weight"] = torch.zeros(2)
    torch.save(broken, tmp_path / "c.pt")
    with pytest.raises(ModelFileError) as caught:
        import_teacher(source=tmp_path / "c.pt", out=tmp_path / "t", **SIZES)
    for part in ("2 missing (scene.weight, scene.bias)", "1 unexpected (backbone.more)", "1 of another shape (head.0.bias [20] found [3])", "--partial"):
        assert part in str(caught.value)
    assert not (tmp_path / "t").exists()
    found = import_teacher(source=tmp_path / "c.pt", out=tmp_path / "t", partial=True, **SIZES)
    notes = found.json("metrics.json")["imported"]
    assert (notes["missing"], notes["unexpected"], notes["misshapen"], notes["first_left"]) == (2, 1, 1, ["fc.weight"])
    assert not load_model(found).recipe.heads
    with pytest.raises(ModelFileError, match="--dim"):
        import_teacher(source=tmp_path / "c.pt", out=tmp_path / "u")  # the default sizes are others


def test_tied_weights_become_two_and_views_are_copied(tmp_path: Path) -> None:
    from fmdeploy.teacher.importing.checkpoint import read_checkpoint

    shared = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": shared, "b": shared, "t": shared.T, "row": shared[1]}, tmp_path / "tied.pt")
    tensors, counts = read_checkpoint(tmp_path / "tied.pt", max_bytes=2**20, seconds=120)
    assert counts == {"tensors": 4, "others": 0}
    assert torch.equal(tensors["a"], shared)
    assert torch.equal(tensors["b"], shared)
    assert torch.equal(tensors["t"], shared.T)
    assert torch.equal(tensors["row"], shared[1])


def test_prefixes_are_found_by_what_fits() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = network.state_dict()
    tensors = {"student.0.weight": torch.ones(1), **{f"ema.teacher.{name}": value for name, value in state.items()}}
    fit = fit_to(network, tensors)
    assert fit.whole
    assert fit.prefix == "ema.teacher."
    assert fit.left == ("student.0.weight",)


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "bert"}, "is no backbone that can be imported"), ({"hidden_size": 15}, "does not fit the network|do not make a network"),
    ({"hidden_size": 32}, "does not fit the network"), ({"image_size": [16, 16]}, "square|do not make a network|cannot be loaded"),
    ({"hidden_size": 2**20}, "too large to be built"), ({"num_hidden_layers": 10**9}, "too large to be built"),
    ({"image_size": 10**9}, "too large to be built"), ({"mlp_ratio": 10**9}, "too large to be built"),
    ({"num_channels": 10**400}, "too large to be built"), ({"auto_map": {"AutoModel": "evil--code.Model"}}, ""),
])
def test_folders_that_cannot_be_imported_say_why(home: Path, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "f", "dinov2")
    values = json.loads((tmp_path / "f" / "config.json").read_text()) | change
    (tmp_path / "f" / "config.json").write_text(json.dumps(values))
    if not message:  # remote code is not even looked at
        assert import_teacher(source=tmp_path / "f", out=tmp_path / "t").kind.value == "TEACHER"
        return
    with pytest.raises(InputError, match=message) as caught:
        import_teacher(source=tmp_path / "f", out=tmp_path / "t")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
def test_neither_a_folder_nor_a_checkpoint_may_be_larger_than_allowed(kind: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "f", "dinov2")
    source = tmp_path / "f" if kind == "folder" else tmp_path / "f/model.safetensors"
    with pytest.raises(ModelFileError, match=r"is too large \(expected at most 10737 bytes.*--max-gib"):
        import_teacher(source=source, out=tmp_path / "t", max_gib=1e-5)
    assert not (tmp_path / "t").exists()


def test_pickled_weights_in_a_folder_are_not_read_unasked(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", "dinov2")
    (tmp_path / "f" / "model.safetensors").rename(tmp_path / "f" / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match="no safetensors file.*pytorch_model.bin.*--hf-config"):
        import_teacher(source=tmp_path / "f", out=tmp_path / "t")


def test_images_pass_through_where_channels_agree(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", "dinov2")
    (tmp_path / "f" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.5]}))
    teacher = load_model(import_teacher(source=tmp_path / "f", out=tmp_path / "t", task="image-classification")).module
    assert isinstance(teacher, ImportedTeacher)
    image = torch.rand(1, 3, 32, 32)
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.25, 0.5])[:, None, None]
    assert torch.allclose(teacher.backbone.entry(image), (image - mean) / std, atol=1e-5)


def test_values_that_are_not_finite_are_refused(home: Path, tmp_path: Path) -> None:
    state = load_model(open_artifact(home / "teacher")).module.state_dict()
    state["scene.bias"] = state["scene.bias"] * float("nan")
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ModelFileError, match="scene.bias holds values that are not finite"):
        import_teacher(source=tmp_path / "c.pt", out=tmp_path / "t", **SIZES)
