"""A trained network inside an artifact: `model.safetensors` and the `model.json` that says how to build it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import nn

from fmdeploy.artifact import Artifact
from fmdeploy.config import validate
from fmdeploy.draft import Draft
from fmdeploy.errors import ConfigError, ModelFileError
from fmdeploy.models.additions import Addition, add, additions_of
from fmdeploy.models.factory import make_teacher
from fmdeploy.models.outputs import num_parameters
from fmdeploy.task import Task, load_task

WEIGHTS = "model.safetensors"
RECIPE = "model.json"


class Recipe(BaseModel):
    """The content of `model.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    task: str
    role: Literal["teacher", "student"]
    name: str = ""
    options: dict[str, Any] = {}
    parameters: int
    io_digest: str
    heads: bool = True
    """Whether the outputs were trained; a backbone that was only pre-trained has features alone."""
    added: tuple[Addition, ...] = ()
    """Parts that were merged into it and stay parts of their own: bottleneck adapters, visual prompts."""


@dataclass(frozen=True)
class LoadedModel:
    """A network with the weights of an artifact, in evaluation mode, and the task it belongs to."""

    task: Task
    recipe: Recipe
    module: nn.Module


def save_model(
    draft: Draft, module: nn.Module, *, task: str, role: Literal["teacher", "student"], name: str,
    options: Mapping[str, Any], heads: bool = True,
) -> None:
    """Write weights and recipe.

    Args:
        draft: Of a TEACHER or STUDENT.
        module: Its state is saved, contiguous, on the CPU.
        task: As given to `load_task`.
        role: Which factory of the task builds it.
        name: The student's name; empty for a task's own teacher, `hf:` for an imported one.
        options: What the factory was given. A module with an attribute `rebuild` (name and options) says itself:
            the built-in ones name all their sizes, so that a new default does not orphan old artifacts.
        heads: Whether its outputs were trained.
    """
    name, chosen = getattr(module, "rebuild", (name, dict(options)))
    recipe = Recipe(task=task, role=role, name=name, options=chosen, parameters=num_parameters(module),
                    io_digest=load_task(task).io.digest, heads=heads, added=additions_of(module))
    state = {key: value.detach().to("cpu").contiguous().clone() for key, value in module.state_dict().items()}
    save_file(state, draft.path(WEIGHTS))
    draft.write_json(RECIPE, recipe.model_dump(mode="json"))


def load_model(artifact: Artifact) -> LoadedModel:
    """Build the network of a TEACHER or STUDENT and load its weights.

    Raises:
        ModelFileError: the task now has another input or output, or the weights do not fit the network.
        ConfigError: the task or the student cannot be built here.
    """
    recipe = validate(Recipe, artifact.json(RECIPE), where=artifact.path(RECIPE))
    task = load_task(recipe.task)
    if task.io.digest != recipe.io_digest:
        raise ModelFileError(
            f"was made for another input or output of {recipe.task}", where=artifact.root,
            expected=task.io.digest[:12], found=recipe.io_digest[:12], fix="Train it again",
        )
    with torch.random.fork_rng(devices=[]):
        module = build_network(task, recipe)
    try:
        module.load_state_dict(load_file(artifact.path(WEIGHTS)))
    except RuntimeError as error:
        reason = str(error).replace("\n", " ")[:300]
        raise ModelFileError(f"weights do not fit the network: {reason}", where=artifact.path(WEIGHTS)) from error
    return LoadedModel(task, recipe, module.eval())


def build_network(task: Task, recipe: Recipe) -> nn.Module:
    """The network of a recipe, with what was added to it and first weights from the global generator.

    Raises:
        ConfigError: it cannot be built here.
    """
    if recipe.role == "teacher":
        module = make_teacher(task, recipe.name, recipe.options)
    else:
        module = task.student(recipe.name, recipe.options)
    return add(module, recipe.added)


def require_heads(loaded: LoadedModel, where: object) -> LoadedModel:
    """`loaded`, where its outputs were trained.

    Raises:
        ConfigError: it was trained by features alone.
    """
    if not loaded.recipe.heads:
        raise ConfigError("was trained by features alone: its outputs mean nothing yet", where=where,
                          fix=f"Train its heads: fmdeploy distill --init {where}, with labels or a teacher's logits")
    return loaded
