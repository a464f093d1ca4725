"""`teacher recalibrate`: fit a teacher's normalisation to another sensor, on unlabelled data.

BatchNorm: running mean and variance are estimated anew on the new data (AdaBN, arXiv:1603.04779).

GroupNorm and LayerNorm have no running statistics: what they put out on new data has other moments than before. With
n_c channel c of their normalised output before the affine part, (m_c, s_c) its mean and deviation on the old data and
(m'_c, s'_c) on the new, the affine part  g_c n_c + b_c  becomes

    g_c ((n_c - m'_c) r_c + m_c) + b_c,   r_c = s_c / s'_c,

that is  g_c <- g_c r_c  and  b_c <- b_c + g_c (m_c - m'_c r_c).  Layers are corrected in the order in which they run,
each on the output of the corrected ones before it. `strength` takes a step from the old (0) to the new (1) affine part.

Legend: C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.command import command
from fmdeploy.config import InputPath, OutputPath
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.trained_on import TrainedOnConfig, check_training_data
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ConfigError
from fmdeploy.manifest import Kind
from fmdeploy.models import input_list, num_parameters
from fmdeploy.models.saved import LoadedModel, load_model, save_model
from fmdeploy.task import Samples
from fmdeploy.teacher.adapt.adapt import predict_with
from fmdeploy.teacher.adapt.effect import measure_effect
from fmdeploy.teacher.objectives.store import pass_on
from fmdeploy.teacher.scores import write_scores
from fmdeploy.training.device import first_decides

MAX_RATIO = 4.0
"""A channel that is nearly constant on one of the data would be blown up: r_c stays within 1/4 and 4."""
EPS = 1e-6
Norm = nn.GroupNorm | nn.LayerNorm


class RecalibrateConfig(TrainedOnConfig):
    """What is recalibrated, on what."""

    teacher: InputPath = Field(description="TEACHER")
    data: InputPath = Field(description="DATASET of the new sensor; its labels are used to measure only")
    out: OutputPath = Field(description="Where the new TEACHER is written")
    source_data: InputPath | None = Field(default=None, description=(
        "DATASET of the old sensor: what GroupNorm and LayerNorm are matched to. BatchNorm needs none"))
    samples: int = Field(default=256, ge=8, description="samples of each train split to take statistics of")
    strength: float = Field(default=1.0, gt=0, le=1, description=(
        "share of the way from the old affine part (0) to the new (1)"))
    seed: int = Field(default=0, ge=0, description="which samples those are")


@command(RecalibrateConfig)
def recalibrate(config: RecalibrateConfig) -> Artifact:
    """Fit normalisation layers to another sensor, without labels.

    Raises:
        ArtifactError: an input is not what it should be, or something else is at `out`.
        ConfigError: there is no normalisation, or source data is needed and not given.
        LeakageError: the teacher was trained, or is recalibrated, on what the new one is judged on.
    """
    start = _start(config)
    return produce(config.out, Kind.TEACHER, stage="teacher recalibrate", config=config, inputs=start.inputs(),
                   build=lambda draft: _build(draft, config, start))


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    teacher: Artifact
    loaded: LoadedModel
    data: Dataset
    source: Dataset | None
    elsewhere: dict[str, str]
    """Other datasets that the teacher was trained on, and whether they were compared with the held-out splits."""

    def inputs(self) -> dict[str, Artifact]:
        """Roles of the artifacts, for the manifest."""
        given = {"teacher": self.teacher, "data": self.data.artifact}
        return given | ({"source_data": self.source.artifact} if self.source is not None else {})


def _start(config: RecalibrateConfig) -> Start:
    teacher, data = open_artifact(config.teacher, Kind.TEACHER), open_dataset(config.data)
    source = open_dataset(config.source_data) if config.source_data is not None else None
    loaded = load_model(teacher)
    batch_norms, others = norms_of(loaded.module)
    if not batch_norms and not others:
        raise ConfigError("has no normalisation to recalibrate", where=config.teacher)
    if others and source is None:
        raise ConfigError(f"has {len(others)} GroupNorm or LayerNorm layers, which keep no statistics",
                          where=config.teacher, fix="Give data of the old sensor: --source-data")
    elsewhere = first_decides(lambda: check_training_data(
        [teacher], data, config.teacher_data, replay=[source] if source is not None else []))
    return Start(teacher, loaded, data, source, elsewhere)


def _build(draft: Draft, config: RecalibrateConfig, start: Start) -> None:
    if not draft.is_main:
        return
    loaded, data, source = start.loaded, start.data, start.source
    batch_norms, others = norms_of(loaded.module)
    new = _inputs(loaded, loaded.task.samples(data, "train"), config)
    if others and source is not None:
        old = _inputs(loaded, loaded.task.samples(source, "train"), config)
        match_moments(loaded.module, old, new, config.strength)
    if batch_norms:
        estimate_running(loaded.module, new)
    recipe = loaded.recipe
    save_model(draft, loaded.module, task=recipe.task, role="teacher", name=recipe.name, options=recipe.options,
               heads=recipe.heads)
    pass_on(draft, start.teacher, loaded.module)
    predict = predict_with(loaded, "fp32")
    scores: dict[str, Any] = {}
    if recipe.heads:
        effect = measure_effect(predict_with(load_model(start.teacher), "fp32"), predict, loaded.task, data)
        scores = {**write_scores(draft, predict, loaded.task, data), "target": effect.as_metrics()}
    draft.write_json("metrics.json", {
        "params": num_parameters(loaded.module), "layers": {"batch_norm": len(batch_norms), "other": len(others)},
        **({"teacher_data": start.elsewhere} if start.elsewhere else {}), **scores,
    })


def norms_of(network: nn.Module) -> tuple[list[nn.modules.batchnorm._BatchNorm], list[Norm]]:
    """BatchNorm layers that keep statistics, and GroupNorm and LayerNorm layers that have an affine part."""
    batch = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    other: list[Norm] = [m for m in network.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)
                         and isinstance(m.weight, Tensor) and isinstance(m.bias, Tensor)]
    return batch, other


def _inputs(loaded: LoadedModel, samples: Samples, config: RecalibrateConfig) -> list[Tensor]:
    """The inputs of some samples, in the network's order."""
    count = min(config.samples, len(samples))
    index = np.sort(np.random.default_rng(config.seed).choice(len(samples), count, replace=False))
    inputs, _ = samples.batch(index)
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in input_list(loaded.task.io, inputs)]


@torch.no_grad()
def estimate_running(network: nn.Module, inputs: list[Tensor]) -> None:
    """Mean and variance of every BatchNorm on these inputs, in place: each on the output of the new ones before it."""
    kept = {module: (module.training, module.momentum) for module in norms_of(network)[0]}
    for module in kept:
        module.reset_running_stats()
        module.train()
        module.momentum = None  # a plain average over batches; here there is one
    network(*inputs)
    for module, (training, momentum) in kept.items():
        module.train(training)
        module.momentum = momentum


@dataclass
class _Moments:
    """Mean and deviation (C,) of a layer's normalised output."""

    mean_C: Tensor
    std_C: Tensor


@torch.no_grad()
def match_moments(network: nn.Module, old: list[Tensor], new: list[Tensor], strength: float = 1.0) -> None:
    """Fold the correction at the top of this file into every GroupNorm and LayerNorm of the network, in place."""
    found: dict[nn.Module, _Moments] = {}

    def remember(module: nn.Module, output: Tensor) -> Tensor:
        found[module] = _moments(module, output)
        return output

    def correct(module: nn.Module, output: Tensor) -> Tensor:
        if module not in found:
            return output
        target = found.pop(module)  # a layer that runs twice is corrected once
        here = _moments(module, output)
        ratio_C = (target.std_C / here.std_C.clamp_min(EPS)).clamp(1 / MAX_RATIO, MAX_RATIO)
        ratio_C = torch.where((target.std_C < EPS) | (here.std_C < EPS), torch.ones_like(ratio_C), ratio_C)
        scale_C = 1 + strength * (ratio_C - 1)
        move_C = strength * (target.mean_C - here.mean_C * ratio_C)
        weight_C, bias_C = module.get_parameter("weight"), module.get_parameter("bias")
        layout = _layout(module, output)
        y = (output - bias_C.view(layout)) * scale_C.view(layout) + (bias_C + weight_C * move_C).view(layout)
        bias_C.add_(weight_C * move_C)
        weight_C.mul_(scale_C)
        return y

    network.eval()
    for inputs, what in ((old, remember), (new, correct)):
        with _after_norms(network, what):
            network(*inputs)


@contextmanager
def _after_norms(network: nn.Module, what: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
    handles = [module.register_forward_hook(lambda m, i, output: what(m, output)) for module in norms_of(network)[1]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moments(module: nn.Module, output: Tensor) -> _Moments:
    """Of the normalised output before the affine part, channel by channel, over everything else."""
    axes = [axis for axis, size in enumerate(_layout(module, output)) if size == 1]
    mean_C, std_C = output.mean(axes).reshape(-1), output.std(axes, correction=0).reshape(-1)
    weight_C, bias_C = module.get_parameter("weight").reshape(-1), module.get_parameter("bias").reshape(-1)
    safe_C = torch.where(weight_C.abs() < EPS, torch.ones_like(weight_C), weight_C)
    dead_C = weight_C.abs() < EPS
    mean_C, std_C = (mean_C - bias_C) / safe_C, std_C / safe_C.abs()
    return _Moments(mean_C.masked_fill(dead_C, 0.0), std_C.masked_fill(dead_C, 0.0))


def _layout(module: nn.Module, output: Tensor) -> tuple[int, ...]:
    """A shape under which the affine part broadcasts over the output: channels second (GroupNorm) or last."""
    if isinstance(module, nn.GroupNorm):
        return 1, -1, *([1] * (output.ndim - 2))
    return *([1] * (output.ndim - module.get_parameter("weight").ndim)), *module.get_parameter("weight").shape
