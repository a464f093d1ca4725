"""`teacher import`: a network that was trained elsewhere becomes a TEACHER."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple

import torch
from pydantic import Field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from fmdeploy.artifact import Artifact
from fmdeploy.command import command
from fmdeploy.config import InputPath, OutputPath, Positional, RunOnly, StageConfig
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ModelFileError
from fmdeploy.manifest import EVALUATED_ON, Kind
from fmdeploy.models import num_parameters
from fmdeploy.models.imported import ImportedTeacher, family_of, imported_teacher
from fmdeploy.models.saved import LoadedModel, Recipe, save_model
from fmdeploy.models.tokens import TokenBackbone
from fmdeploy.provenance import hugging_face_files, source_digest
from fmdeploy.task import Task, load_task
from fmdeploy.teacher.adapt.adapt import predict_with
from fmdeploy.teacher.importing.checkpoint import GIB, read_checkpoint
from fmdeploy.teacher.importing.fit import Fit, fit_to, load_fit
from fmdeploy.teacher.importing.folder import for_input, load_folder, read_json, start_entry
from fmdeploy.teacher.scores import write_scores

SIZES = ("dim", "depth", "heads", "stem_width", "width")
ANCHOR = "embeddings.patch_embeddings.projection.weight"
"""A tensor that every encoder in the Hugging Face format has, under this name."""


class ImportConfig(StageConfig):
    """What is imported, and for which task."""

    source: Annotated[InputPath, Positional()] = Field(
        description="Hugging Face folder of a DINOv2, ViT-MAE or I-JEPA, or a checkpoint (.pt, .pth, .safetensors)")
    out: OutputPath = Field(description="Where the TEACHER is written")
    task: str = Field(default="bev-occupancy", description="built-in task, or module:Class")
    hf_config: InputPath | None = Field(default=None, description=(
        "checkpoint: Hugging Face folder or config.json that says what it is; none: the task's own teacher"))
    side: int | None = Field(default=None, ge=1, description=(
        "tokens a side of an imported encoder, a divisor of the input's width; none: nearest to its own"))
    dim: int | None = Field(default=None, ge=1, description="task's own teacher: width of the transformer")
    depth: int | None = Field(default=None, ge=1, description="blocks of the transformer")
    heads: int | None = Field(default=None, ge=1, description="attention heads")
    stem_width: int | None = Field(default=None, ge=1, description="channels at half resolution")
    width: int | None = Field(default=None, ge=1, description="channels at quarter resolution")
    partial: bool = Field(default=False, description="take what fits; what does not is recorded in metrics.json")
    data: InputPath | None = Field(default=None, description="DATASET to evaluate on, where the outputs came along")
    seed: int = Field(default=0, ge=0, lt=2**31, description="of the weights that do not come from the source")
    max_gib: Annotated[float, RunOnly()] = Field(default=4.0, gt=0, description="largest file or folder that is read")
    seconds: Annotated[float, RunOnly()] = Field(default=120.0, gt=0, description="longest that reading may take")

    @model_validator(mode="after")
    def _agree(self) -> ImportConfig:
        if self.sizes() and (self.hf_config is not None or self.source.is_dir()):
            raise ValueError(f"sizes are those of the imported encoder: leave out {', '.join(self.sizes())}")
        if self.hf_config is not None and self.source.is_dir():
            raise ValueError("a folder brings its own config")
        return self

    def resolved(self) -> dict[str, Any]:
        """With hashes of what is imported in place of trust in its name."""
        return {**super().resolved(), "task_source": source_digest(self.task), "source": digest_of(self.source),
                "hf_config": None if self.hf_config is None else digest_of(config_file(self.hf_config))}

    def sizes(self) -> dict[str, Any]:
        """The size options that were given, for `Task.teacher`."""
        given = {name: getattr(self, name) for name in SIZES}
        return {name: value for name, value in given.items() if value is not None}


class Found(NamedTuple):
    """An imported network."""

    module: nn.Module
    heads: bool
    """Whether its outputs were trained."""
    notes: dict[str, Any]


@command(ImportConfig)
def import_teacher(config: ImportConfig) -> Artifact:
    """Make a TEACHER of a network that was trained elsewhere; nothing in the source is ever run.

    Raises:
        ModelFileError: the source holds code, is damaged, too large, or does not fit.
        ConfigError: it is of a family that cannot be imported, or does not suit the task.
    """
    task = load_task(config.task)
    data = open_dataset(config.data) if config.data is not None else None
    _refuse_odd(config.source)
    _refuse_large(config.source, int(config.max_gib * GIB))
    return produce(config.out, Kind.TEACHER, stage="teacher import", config=config,
                   inputs={EVALUATED_ON: data.artifact} if data is not None else {},
                   build=lambda draft: _build(draft, config, task, data))


def _build(draft: Draft, config: ImportConfig, task: Task, data: Dataset | None) -> None:
    if not draft.is_main:
        return
    torch.manual_seed(config.seed)
    if config.source.is_dir():
        found = from_folder(config.source, task, config)
    elif config.hf_config is not None:
        found = _from_checkpoint_with_config(config, config.hf_config, task)
    else:
        found = _from_checkpoint(config, task)
    options = config.sizes()
    save_model(draft, found.module, task=config.task, role="teacher", name="", options=options, heads=found.heads)
    scores = {}
    if data is not None and found.heads:
        recipe = Recipe(task=config.task, role="teacher", options=options, parameters=0, io_digest=task.io.digest)
        scores = write_scores(draft, predict_with(LoadedModel(task, recipe, found.module), "fp32"), task, data)
    draft.write_json("metrics.json", {"params": num_parameters(found.module), "imported": found.notes, **scores})


def from_folder(folder: Path, task: Task, config: ImportConfig, notes: dict[str, Any] | None = None) -> Found:
    """A teacher around the encoder of a Hugging Face folder, its heads untrained."""
    encoder, values, fit = load_folder(folder)
    family = family_of(values, where=folder)
    load_fit(encoder, fit, partial=config.partial, where=config.source)
    plain = for_input(encoder, values, family, task.io.inputs[0].shape[-1], config.side)
    teacher = imported_teacher({"config": plain}, task.io)
    assert isinstance(teacher, ImportedTeacher)
    backbone = teacher.backbone
    backbone.encoder.load_state_dict(encoder.state_dict())
    passed = start_entry(backbone.entry, folder)
    return Found(teacher, False, {"family": values["model_type"], "side": backbone.side, "images_pass": passed,
                                  **fit.as_metrics(), **(notes or {})})


def _from_checkpoint_with_config(config: ImportConfig, said: Path, task: Task) -> Found:
    """Put the checkpoint's tensors beside the configuration, under the names that such a folder has."""
    tensors, counts = _tensors(config)
    ends = [name for name in tensors if name.endswith(ANCHOR)]
    if not ends:
        raise ModelFileError("holds no encoder in the Hugging Face format", where=config.source, expected=ANCHOR,
                             found=", ".join(list(tensors)[:3]))
    prefix = min(ends, key=len).removesuffix(ANCHOR)
    with tempfile.TemporaryDirectory(prefix="fmdeploy-import-") as name:
        folder = Path(name)
        source = config_file(said)
        for extra in (source, source.with_name("preprocessor_config.json")):
            if extra.is_file():
                read_json(extra)
                shutil.copyfile(extra, folder / ("config.json" if extra == source else extra.name))
        mine = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        save_file(mine, folder / "model.safetensors", metadata={"format": "pt"})
        return from_folder(folder, task, config, {"prefix": prefix, **counts})


def _from_checkpoint(config: ImportConfig, task: Task) -> Found:
    """Fit a checkpoint onto the task's own teacher; where only its backbone fits, onto that."""
    tensors, counts = _tensors(config)
    module = task.teacher(config.sizes())
    fit, part, heads = fit_to(module, tensors), module, True
    backbone = getattr(module, "backbone", None)
    if isinstance(backbone, TokenBackbone) and all(name.startswith("backbone.") for name in fit.state):
        fit, part, heads = fit_to(backbone, tensors), backbone, False  # no head came along
    load_fit(part, fit, partial=config.partial, where=config.source)
    return Found(module, heads and _heads_fit(fit), {**counts, **fit.as_metrics()})


def _heads_fit(fit: Fit) -> bool:
    """Whether everything outside the backbone came along."""
    return not any(not name.startswith("backbone.") for name in (*fit.missing, *fit.misshapen))


def _tensors(config: ImportConfig) -> tuple[dict[str, Tensor], dict[str, int]]:
    return read_checkpoint(config.source, max_bytes=int(config.max_gib * GIB), seconds=config.seconds)


def config_file(path: Path) -> Path:
    """The `config.json` that a folder or file stands for."""
    return path / "config.json" if path.is_dir() else path


def _refuse_odd(path: Path) -> None:
    """What is neither a folder nor a plain file is refused before anything waits for it.

    Raises:
        ModelFileError: it is missing, or a FIFO, a device or the like.
    """
    if not path.exists():
        raise ModelFileError("no such file or folder", where=path, fix="Check the path")
    if not (path.is_dir() or path.is_file()):
        raise ModelFileError("is not a regular file", where=path)


def _refuse_large(path: Path, max_bytes: int) -> None:
    """Before any of it is hashed or read.

    Raises:
        ModelFileError: the file, or what is read of the folder, is larger than `max_bytes`.
    """
    files = hugging_face_files(path) if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    if size > max_bytes:
        raise ModelFileError("is too large", where=path, expected=f"at most {max_bytes} bytes", found=size,
                             fix="Allow more with --max-gib")


def digest_of(path: Path) -> str | None:
    """sha256 of a file, or of the configuration and weights in a folder; None for anything else."""
    if path.is_dir():
        return source_digest(f"hf:{path}")
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return _sha(stream)


def _sha(stream: IO[bytes]) -> str:
    sha = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        sha.update(chunk)
    return sha.hexdigest()

