"""`teacher merge`: a frozen teacher and its adapter become one TEACHER.

Low-rank updates are folded into the weights; biases, norms and heads take the place of the old ones. Bottlenecks and
prompts are no linear function of the weights: they stay parts of their own, which the recipe names.
"""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.command import command
from fmdeploy.config import InputPath, OutputPath, StageConfig
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import FmdeployError
from fmdeploy.iospec import IOSpec
from fmdeploy.manifest import EVALUATED_ON, Kind
from fmdeploy.models import num_parameters
from fmdeploy.models.saved import LoadedModel, save_model
from fmdeploy.teacher.adapt.adapt import predict_with
from fmdeploy.teacher.adapt.lora import fold_lora
from fmdeploy.teacher.adapt.store import load_adapted, read_recipe
from fmdeploy.teacher.objectives.store import pass_on
from fmdeploy.teacher.scores import EVALUATIONS, GUARD, write_scores

TOLERANCE = 1e-5
SAMPLES = 8
CARRIED = (*(f"{name}{suffix}" for name in EVALUATIONS.values() for suffix in (".json", ".safetensors")),
           "examples.safetensors", GUARD)


class MergeConfig(StageConfig):
    """What is merged."""

    teacher: InputPath = Field(description="TEACHER that the adapter was trained on")
    adapter: InputPath = Field(description="ADAPTER")
    out: OutputPath = Field(description="Where the new TEACHER is written")
    data: InputPath | None = Field(default=None, description=(
        "DATASET to evaluate on; none: the adapter's evaluations are carried over"))


@command(MergeConfig)
def merge(config: MergeConfig) -> Artifact:
    """Merge an adapter into its teacher; the outputs stay equal to 1e-5.

    Raises:
        ArtifactError: the adapter was trained on another teacher, or something else is at `out`.
    """
    teacher, adapter = open_artifact(config.teacher, Kind.TEACHER), open_artifact(config.adapter, Kind.ADAPTER)
    data = open_dataset(config.data) if config.data is not None else None
    loaded = load_adapted(teacher, adapter)
    inputs = {"teacher": teacher, "adapter": adapter, **({EVALUATED_ON: data.artifact} if data is not None else {})}
    return produce(config.out, Kind.TEACHER, stage="teacher merge", config=config, inputs=inputs,
                   build=lambda draft: _build(draft, loaded, teacher, adapter, data))


def _build(draft: Draft, loaded: LoadedModel, teacher: Artifact, adapter: Artifact, data: Dataset | None) -> None:
    if not draft.is_main:
        return
    inputs = _inputs(loaded.task.io)
    before = _outputs(loaded.module, inputs)
    fold_lora(loaded.module).requires_grad_(True)
    error = max(_difference(a, b) for a, b in zip(before, _outputs(loaded.module, inputs), strict=True))
    if error > TOLERANCE:
        raise FmdeployError("the merged teacher computes something else", where=adapter.root,
                            expected=f"at most {TOLERANCE:g}", found=f"{error:g}")
    recipe = loaded.recipe
    save_model(draft, loaded.module, task=recipe.task, role="teacher", name=recipe.name, options=recipe.options,
               heads=recipe.heads)
    pass_on(draft, teacher, loaded.module)
    scores = _carried(draft, adapter) if data is None else write_scores(
        draft, predict_with(loaded, "fp32"), loaded.task, data)
    draft.write_json("metrics.json", {
        "params": num_parameters(loaded.module), "merge_error": error, "method": read_recipe(adapter).plan.method,
        **scores,
    })


def _carried(draft: Draft, adapter: Artifact) -> dict[str, Any]:
    """The adapter's evaluations, which are those of the merged network."""
    for name in filter(adapter.has, CARRIED):
        shutil.copyfile(adapter.path(name), draft.path(name))
    metrics = adapter.json("metrics.json")
    return {split: metrics[split] for split in EVALUATIONS if split in metrics}


def _inputs(io: IOSpec) -> tuple[Tensor, ...]:
    """A few inputs of random numbers within the ranges that the task promises."""
    rng, found = np.random.default_rng(0), []
    for spec in io.inputs:
        low, high = spec.value_range or (0.0, 1.0)
        found.append(torch.from_numpy(rng.uniform(low, high, (SAMPLES, *spec.shape)).astype(spec.dtype)))
    return tuple(found)


@torch.no_grad()
def _outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    found = module(*inputs)
    return found if isinstance(found, tuple) else (found,)


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value where that is above 1."""
    return float((a - b).abs().max() / a.abs().max().clamp_min(1.0))
