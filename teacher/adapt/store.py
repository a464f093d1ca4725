"""The ADAPTER artifact: what was trained on top of a frozen teacher, and nothing of the teacher itself.

    adapter.json          the plan, the task, how many parameters were trained
    adapter.safetensors   those parameters, by the names that they have in the adapted teacher
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import nn

from fmdeploy.artifact import Artifact
from fmdeploy.config import validate
from fmdeploy.draft import Draft
from fmdeploy.errors import ArtifactError, ModelFileError
from fmdeploy.models.saved import LoadedModel, load_model
from fmdeploy.teacher.adapt.methods import Plan, apply_plan

WEIGHTS = "adapter.safetensors"
RECIPE = "adapter.json"


class AdapterRecipe(BaseModel):
    """The content of `adapter.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    plan: Plan
    trained: int
    """Parameters that the ADAPTER holds."""
    parameters: int
    """Those of the teacher alone."""
    heads: bool
    """Whether the outputs of the adapted teacher are of use."""


def save_adapter(draft: Draft, teacher: nn.Module, names: list[str], recipe: AdapterRecipe) -> None:
    """Write the parameters `names` of the adapted teacher."""
    state = {name: teacher.get_parameter(name).detach().to("cpu").contiguous().clone() for name in names}
    save_file(state, draft.path(WEIGHTS))
    draft.write_json(RECIPE, recipe.model_dump(mode="json"))


def read_recipe(adapter: Artifact) -> AdapterRecipe:
    """How an ADAPTER is put on its teacher."""
    return validate(AdapterRecipe, adapter.json(RECIPE), where=adapter.path(RECIPE))


def load_adapted(base: Artifact, adapter: Artifact) -> LoadedModel:
    """The frozen teacher with one of its adapters on, in evaluation mode.

    Every call builds a network of its own, so that adapters of several sites stand side by side over one base.

    Raises:
        ArtifactError: the adapter was trained on another teacher.
        ModelFileError: its weights do not fit.
    """
    wanted = adapter.inputs["teacher"].digest
    if wanted != base.digest:
        raise ArtifactError("was trained on another teacher", where=adapter.root, expected=wanted[:12],
                            found=f"{base.digest[:12]} at {base.root}", fix="Name that teacher, or adapt this one")
    recipe, loaded = read_recipe(adapter), load_model(base)
    with torch.random.fork_rng(devices=[]):
        names = apply_plan(loaded, recipe.plan)
    _fill(loaded.module, names, adapter)
    loaded.module.requires_grad_(False)
    return LoadedModel(loaded.task, loaded.recipe.model_copy(update={"heads": recipe.heads}), loaded.module.eval())


def _fill(teacher: nn.Module, names: list[str], adapter: Artifact) -> None:
    path = adapter.path(WEIGHTS)
    state = load_file(path)
    if set(state) != set(names):
        odd = sorted(set(state) ^ set(names))
        raise ModelFileError(f"holds other parameters than its plan trains: {odd[0]} and {len(odd) - 1} more",
                             where=path, expected=len(names), found=len(state))
    for name in names:
        parameter = teacher.get_parameter(name)
        if parameter.shape != state[name].shape:
            raise ModelFileError(f"{name} has another shape", where=path, expected=tuple(parameter.shape),
                                 found=tuple(state[name].shape))
        parameter.data.copy_(state[name])
