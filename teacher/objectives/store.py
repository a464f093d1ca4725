"""Objectives whose own weights are of use after training (a world model) travel with the TEACHER.

They read the features of its backbone, so that a TEACHER made from it keeps them only where its backbone is the same.

    objectives.json                   name → options and steps, of the objectives that are kept
    objectives/<name>.safetensors     their weights
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fmdeploy.artifact import Artifact
from fmdeploy.config import validate
from fmdeploy.draft import Draft
from fmdeploy.errors import ArtifactError, ModelFileError
from fmdeploy.models.saved import LoadedModel, load_model
from fmdeploy.models.tokens import backbone_of
from fmdeploy.progress import say
from fmdeploy.teacher.objectives.base import Objective
from fmdeploy.teacher.objectives.pretraining import Pretraining
from fmdeploy.teacher.objectives.registry import kind_of

INDEX = "objectives.json"


def weights_name(name: str) -> str:
    """Payload name of one objective's weights."""
    return f"objectives/{name}.safetensors"


def save_objectives(draft: Draft, trained: Pretraining) -> None:
    """Write the objectives that are kept; nothing where there are none."""
    kept = {name: objective for name, objective in trained.each().items() if objective.kept}
    for name, objective in kept.items():
        state = {key: value.detach().to("cpu").contiguous().clone() for key, value in objective.state_dict().items()}
        save_file(state, draft.path(weights_name(name)))
    if kept:
        draft.write_json(INDEX, {name: {"config": objective.config.model_dump(mode="json"), "steps": objective.steps}
                                 for name, objective in kept.items()})


def kept_in(artifact: Artifact) -> dict[str, Any]:
    """Options and steps of the objectives that a TEACHER keeps, by name."""
    return dict(artifact.json(INDEX)) if artifact.has(INDEX) else {}


def pass_on(draft: Draft, source: Artifact, network: nn.Module) -> None:
    """Carry what the TEACHER `source` keeps over to `network`, which was made from it; or say that it is left out."""
    kept = kept_in(source)
    if not kept:
        return
    if not _equal(_features(load_model(source).module, source), _features(network, source)):
        for name in kept:
            say(f"{source.root}: its {name} is left out: it reads the features of the old backbone, and they changed; "
                f"train a new one with: fmdeploy teacher train --init … --objective {name}")
        return
    for name in kept:
        shutil.copyfile(source.path(weights_name(name)), draft.path(weights_name(name)))
    draft.write_json(INDEX, kept)


def say_replaced(source: Artifact, trained: Collection[str]) -> None:
    """Say what becomes of the objectives that the TEACHER `source` keeps when its backbone is trained further.

    Args:
        source: Where a run starts from.
        trained: Names of the objectives of the run.
    """
    for name in kept_in(source):
        what = "starts from fresh weights" if name in trained else f"is left out; --objective {name} trains a new one"
        say(f"{source.root}: its {name} reads the features of the old backbone, which this run changes: it {what}")


def _features(network: nn.Module, source: Artifact) -> dict[str, Tensor]:
    """Weights that make the features."""
    return dict(backbone_of(network, where=source.root).state_dict())


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def load_objective(artifact: Artifact, loaded: LoadedModel, name: str) -> Objective:
    """The objective `name` of a TEACHER, with its weights, in evaluation mode.

    Raises:
        ArtifactError: the TEACHER keeps no such objective.
        ModelFileError: its weights do not fit.
    """
    index = kept_in(artifact)
    if name not in index:
        raise ArtifactError(f"keeps no objective {name!r}", where=artifact.root, found=", ".join(index) or "none",
                            fix=f"Train one with: fmdeploy teacher train --objective {name}")
    kind = kind_of(name)
    config = validate(kind.Config, index[name]["config"], where=artifact.path(INDEX))
    objective = kind(loaded.task, loaded.module, config, steps=int(index[name]["steps"]))
    _fill(objective, artifact, name)
    return objective.eval()


def _fill(objective: nn.Module, artifact: Artifact, name: str) -> None:
    path = artifact.path(weights_name(name))
    try:
        objective.load_state_dict(load_file(path))
    except RuntimeError as error:
        reason = str(error).replace("\n", " ")[:300]
        raise ModelFileError(f"weights do not fit the objective: {reason}", where=path) from error
