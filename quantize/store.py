"""A quantised student inside an artifact, without pickle: a placement, weights and ranges.

    quantized.safetensors   folded weights and biases, and `range/<quantizer>` = amax of every quantizer
    placement.json          where the quantizers stand; placement.toml the same for a person to read and edit
    placement.toml          the same for people: edit it and give it to `--placement`
    calibration.json        which samples gave the ranges
    model.json              how to build the float student (copied from the STUDENT)

Restoring traces a fresh student, folds it, puts the quantizers where the table says, and loads weights and ranges:
the result is bit-exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fmdeploy.artifact import Artifact
from fmdeploy.config import validate
from fmdeploy.draft import Draft
from fmdeploy.errors import ArtifactError, ModelFileError
from fmdeploy.models.saved import RECIPE, Recipe
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.build import rebuild, tracing_example
from fmdeploy.quantize.calibrate import Calibration
from fmdeploy.quantize.placement import Placement
from fmdeploy.quantize.placementfile import to_toml
from fmdeploy.task import Task, load_task

WEIGHTS = "quantized.safetensors"
PLACEMENT = "placement.json"
PLACEMENT_TOML = "placement.toml"
PLACEMENT_TOML = "placement.toml"
CALIBRATION = "calibration.json"
RANGE = "range/"
AMAX = "._amax"  # modelopt's buffer inside a quantizer's state


@dataclass(frozen=True)
class LoadedQuantized:
    """A restored quantised student, in evaluation mode."""

    task: Task
    module: nn.Module
    placement: Placement
    calibration: Calibration


def save_state(path: Path, module: nn.Module) -> None:
    """Write weights and ranges of a calibrated quantised module."""
    tensors = {name: value for name, value in module.state_dict().items() if not name.endswith(AMAX)}
    tensors |= {RANGE + name: value for name, value in modelopt.ranges(module).items()}
    # Names decide the order of the file, so that equal weights give equal bytes. Clones, since safetensors refuses
    # tensors that share memory.
    save_file({name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}, path)


def load_state(path: Path, module: nn.Module) -> None:
    """Read weights and ranges into an uncalibrated quantised module, in place.

    Raises:
        ModelFileError: the file is no safetensors file, or does not fit the module.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ModelFileError(f"cannot be read as safetensors: {error}", where=path) from error
    modelopt.set_ranges(module, {k.removeprefix(RANGE): v for k, v in tensors.items() if k.startswith(RANGE)})
    weights = {name: value for name, value in tensors.items() if not name.startswith(RANGE)}
    own = module.state_dict()
    wanted = {name for name in own if not name.endswith(AMAX)}
    if wanted != set(weights) or any(own[name].shape != weights[name].shape for name in wanted):
        raise ModelFileError("weights do not fit the student", where=path, expected=f"{len(wanted)} tensors",
                             found=f"{len(weights)}", fix="Quantise it again")
    module.load_state_dict(weights, strict=False)


def save_quantized(draft: Draft, module: nn.Module, placement: Placement, calibration: Calibration) -> None:
    """Write weights, ranges, placement and calibration into the draft of a QUANTIZED."""
    save_state(draft.path(WEIGHTS), module)
    draft.write_json(PLACEMENT, placement.to_json())
    draft.write_text(PLACEMENT_TOML, to_toml(placement))
    draft.write_text(PLACEMENT_TOML, to_toml(placement))
    draft.write_json(CALIBRATION, calibration.to_json())


def load_quantized(artifact: Artifact) -> LoadedQuantized:
    """Restore the quantised student of a QUANTIZED.

    Raises:
        ArtifactError: the student's code or its task changed since.
        ModelFileError: the weights do not fit.
    """
    recipe = validate(Recipe, artifact.json(RECIPE), where=artifact.path(RECIPE))
    task = load_task(recipe.task)
    if task.io.digest != recipe.io_digest:
        raise ArtifactError(f"was made for another input or output of {recipe.task}", where=artifact.root,
                            expected=task.io.digest[:12], found=recipe.io_digest[:12], fix="Train it again")
    placement = Placement.from_json(artifact.json(PLACEMENT))
    calibration = Calibration.from_json(artifact.json(CALIBRATION))
    with torch.random.fork_rng(devices=[]):
        student = task.student(recipe.name, recipe.options).eval()
    module = rebuild(student, tracing_example(task.io), placement)
    load_state(artifact.path(WEIGHTS), module)
    return LoadedQuantized(task, module.eval(), placement, calibration)
