"""Subjects from artifacts: TEACHER, STUDENT, QUANTIZED and the tiers of a BUNDLE."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fmdeploy.artifact import Artifact
from fmdeploy.config import validate
from fmdeploy.errors import ArtifactError, ConfigError
from fmdeploy.manifest import Kind
from fmdeploy.models import predictor
from fmdeploy.models.saved import RECIPE, LoadedModel, Recipe, build_network, load_model
from fmdeploy.models.tokens import TokenBackbone
from fmdeploy.onnxfile.session import ort_predictor
from fmdeploy.task import Task, load_task
from fmdeploy.teacher.probe.features import features_of
from fmdeploy.teacher.probe.subject import Subject

KINDS = (Kind.TEACHER, Kind.STUDENT, Kind.QUANTIZED, Kind.BUNDLE)
# Restored by a stage above this one, which is imported only when such an artifact is at hand. `load(artifact)` returns
# an object with the attributes `task` and `module`.
LOADERS = {Kind.QUANTIZED: "fmdeploy.quantize.store:load_quantized"}
TIERS = ("int8-cpu", "fp32")  # those that run on a CPU as their types say, the one that serves first
RANDOM = "random"


def open_subject(artifact: Artifact, *, tier: str | None = None, layer: str | None = None) -> Subject:
    """The network in `artifact`.

    Args:
        artifact: One of `KINDS`.
        tier: Of a BUNDLE; default: INT8 where it has one.
        layer: Whose map the features are, for networks without a token backbone; default: the task's own choice.

    Raises:
        ConfigError: the BUNDLE has no such tier, or the network no such layer; features do not come from a layer.
        ModelFileError: the weights do not fit.
    """
    if artifact.kind is Kind.BUNDLE:
        if layer is not None:
            raise ConfigError("a BUNDLE has outputs only, and no layers", where=artifact.root, found=f"layer {layer!r}",
                              fix="Leave --layer out, or probe what it was made from")
        return _tier(artifact, tier)
    if tier is not None:
        raise ConfigError("a tier is part of a BUNDLE", where=artifact.root, found=artifact.kind.value)
    recipe = _recipe(artifact)
    if artifact.kind in LOADERS:
        found = _loader(LOADERS[artifact.kind])(artifact)
        return of_module(found.module, found.task, recipe, artifact=artifact, layer=layer)
    loaded = load_model(artifact)
    return of_module(loaded.module, loaded.task, recipe, artifact=artifact, loaded=loaded, layer=layer, can_train=True)


def of_module(
    module: nn.Module, task: Task, recipe: Recipe, *, artifact: Artifact | None = None,
    loaded: LoadedModel | None = None, layer: str | None = None, can_train: bool = False,
) -> Subject:
    """A subject from a torch network.

    Raises:
        ConfigError: a layer was asked for that the network does not have.
    """
    module = module.to("cuda" if torch.cuda.is_available() else "cpu")
    default = task.teacher_layer if recipe.role == "teacher" else task.student_layer
    if layer is not None and isinstance(getattr(module, "backbone", None), TokenBackbone):
        raise ConfigError("the features of a network with a token backbone are its tokens", where=f"layer {layer!r}",
                          fix="Leave --layer out")
    compute = features_of(module, task.io, default if layer is None else layer)
    if compute is None and layer is not None:
        near = ", ".join(name for name, _ in module.named_modules() if name and "." not in name)
        raise ConfigError("the network has no such layer", where=f"layer {layer!r}", expected=near)
    return Subject(
        name=artifact.kind.value if artifact else RANDOM, task=task, module=module, features=compute,
        predict=predictor(module, task.io) if recipe.heads and artifact is not None else None,
        why="no features: the network has no token backbone and no layer "
            f"{default!r}; name one with --layer" if compute is None else "",
        artifact=artifact, loaded=loaded, can_train=can_train,
    )


def random_subject(artifact: Artifact, *, layer: str | None = None, seed: int = 0) -> Subject | None:
    """The same architecture with fresh weights; None for a BUNDLE, which has no features to compare."""
    if artifact.kind is Kind.BUNDLE:
        return None
    recipe = _recipe(artifact)
    task = load_task(recipe.task)
    return of_module(fresh_module(task, recipe, seed).eval(), task, recipe, layer=layer, can_train=True)


def fresh_module(task: Task, recipe: Recipe, seed: int) -> nn.Module:
    """A new network by the recipe, its weights drawn from `seed`; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_network(task, recipe)


def _recipe(artifact: Artifact) -> Recipe:
    return validate(Recipe, artifact.json(RECIPE), where=artifact.path(RECIPE))


def _loader(target: str) -> Callable[[Artifact], Any]:
    module, _, attribute = target.partition(":")
    function: Callable[[Artifact], Any] = getattr(importlib.import_module(module), attribute)
    return function


def _tier(bundle: Artifact, tier: str | None) -> Subject:
    held = [name for name in TIERS if bundle.has(f"model.{name}.onnx")]
    if not held or (tier is not None and tier not in held):
        raise ConfigError("the bundle has no such tier that runs on a CPU as it is written", where=bundle.root,
                          expected=" or ".join(held) or "model.fp32.onnx", found=tier)
    recipe = _recipe(bundle)
    task = load_task(recipe.task)
    if task.io.digest != recipe.io_digest:
        raise ArtifactError(f"was made for another input or output of {recipe.task}", where=bundle.root,
                            expected=task.io.digest[:12], found=recipe.io_digest[:12], fix="Export it again")
    chosen = tier or held[0]
    predict = ort_predictor(bundle.path(f"model.{chosen}.onnx"), task.io)
    return Subject(name=f"BUNDLE {chosen}", task=task, predict=predict,
                   why="no features: a bundle has outputs only", artifact=bundle)
