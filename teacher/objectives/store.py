"""Objectives whose own weights are of use after training (a world model) travel with the TEACHER.

    objectives.json                   name → options and steps, of the objectives that are kept
    objectives/<name>.safetensors     their weights
"""

from __future__ import annotations

from safetensors.torch import load_file, save_file
from torch import nn

from fmdeploy.artifact import Artifact
from fmdeploy.config import validate
from fmdeploy.draft import Draft
from fmdeploy.errors import ArtifactError, ModelFileError
from fmdeploy.models.saved import LoadedModel
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


def load_objective(artifact: Artifact, loaded: LoadedModel, name: str) -> Objective:
    """The objective `name` of a TEACHER, with its weights, in evaluation mode.

    Raises:
        ArtifactError: the TEACHER keeps no such objective.
        ModelFileError: its weights do not fit.
    """
    index = artifact.json(INDEX) if artifact.has(INDEX) else {}
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
