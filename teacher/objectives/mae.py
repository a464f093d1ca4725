"""Masked reconstruction: hide patches of the sensors' maps, and let a light decoder fill them in.

Masked autoencoders (arXiv:2111.06377) for several sensors on one grid (MultiMAE, arXiv:2204.01678). A token of the
common grid is hidden in one of two ways:

    bev             every sensor's patch is blanked and the token is dropped: filled in from its surroundings
    one input's name  that sensor's patch alone is blanked: filled in from the other sensors at the same place

Legend: B samples, N tokens, K tokens that go through the transformer, M hidden ones, C channels, P cells a side of one
token, D embedding, F = C * P * P values of one patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from pydantic import Field, model_validator
from torch import Tensor, nn

from fmdeploy.errors import ConfigError
from fmdeploy.iospec import TensorSpec
from fmdeploy.models import input_list
from fmdeploy.models.tokens import backbone_of
from fmdeploy.task import Arrays, Samples, Task
from fmdeploy.teacher.objectives.base import Objective, ObjectiveConfig
from fmdeploy.teacher.objectives.masking import Index, arrays_of, random_parts
from fmdeploy.teacher.objectives.predictor import Predictor, blanked, check_grid, patches_of, places, rows_at
from fmdeploy.teacher.objectives.prior import PlacePrior
from fmdeploy.training.loop import Losses, Tensors

BEV = "bev"
KIND = "mae"


class MaeConfig(ObjectiveConfig):
    """Options of `mae`."""

    masked: tuple[str, ...] = Field(default=(), description=(
        "names of inputs, bev; empty: every input, or bev where there is one input"))
    ratio: float | None = Field(default=None, gt=0, lt=1, description=(
        "share of the tokens dropped when `bev` is masked; default: 0.2, or 0.6 where nothing else is"))
    sensor_ratio: float = Field(default=0.45, gt=0, lt=1, description=(
        "share of the tokens that are left in which an input is blanked, for each masked input"))
    width: int = Field(default=96, ge=4, description="width of the decoder")
    depth: int = Field(default=1, ge=1, description="its blocks")
    heads: int = Field(default=4, ge=1, description="its attention heads")
    loss: Literal["auto", "mse", "bce", "patch"] = Field(default="auto", description=(
        "mse and bce: deviation from what stands there on average, each channel alike; patch: MAE's normalised pixels;"
        " auto: bce for named channels between 0 and 1, else patch"))
    positive: float = Field(default=1.0, gt=0, description="weight of a cell that is 1, for bce")

    @model_validator(mode="after")
    def _distinct(self) -> MaeConfig:
        if len(set(self.masked)) != len(self.masked):
            raise ValueError("masked names something twice")
        return self


class MaskedReconstruction(Objective):
    """One part a sensor: the loss of its hidden patches, mean over their cells."""

    name = "mae"
    Config = MaeConfig
    config: MaeConfig

    def __init__(self, task: Task, teacher: nn.Module, config: MaeConfig, *, steps: int) -> None:
        super().__init__(task, teacher, config, steps=steps)
        backbone = backbone_of(teacher, where=self.name)
        self.side, self.num_tokens = backbone.side, backbone.side**2
        self.specs = {spec.name: spec for spec in task.io.inputs}
        check_grid({name: spec.shape for name, spec in self.specs.items()}, self.side, where=self.name)
        self.counts = self._counts()
        self.decoder = Predictor(backbone.dim, self.side, width=config.width, depth=config.depth, heads=config.heads)
        rebuilt = {name: spec for name, spec in self.specs.items() if BEV in self.counts or name in self.counts}
        self.heads = nn.ModuleDict({name: nn.Linear(config.width, spec.shape[0] * self._cells(spec))
                                    for name, spec in rebuilt.items()})
        self.priors = nn.ModuleDict({name: PlacePrior(self.num_tokens, spec.shape[0], self._cells(spec))
                                     for name, spec in rebuilt.items() if self.loss_of(name) != "patch"})
        for name, spec in rebuilt.items():
            if config.loss == "bce" and spec.value_range != (0.0, 1.0):
                raise ConfigError(f"bce needs values between 0 and 1 of input {name!r}", where="mae.loss",
                                  found=spec.value_range, fix="Use mse or patch")

    def _cells(self, spec: TensorSpec) -> int:
        return (spec.shape[1] // self.side) * (spec.shape[2] // self.side)

    def _counts(self) -> dict[str, int]:
        """Hidden tokens of each way, disjoint; what is left goes through the transformer untouched."""
        several = len(self.specs) > 1
        wanted = self.config.masked or (tuple(self.specs) if several else (BEV,))
        if unknown := sorted(set(wanted) - {BEV, *self.specs}):
            raise ConfigError(f"cannot mask {unknown[0]!r}", where="mae.masked", expected=", ".join((BEV, *self.specs)))
        dropped = self.config.ratio or (0.6 if wanted == (BEV,) else 0.2)
        # Sensors share what `bev` leaves, so that ways never meet at a token.
        each = self.config.sensor_ratio * (1 - dropped if BEV in wanted else 1)
        counts = {name: max(1, round(self.num_tokens * (dropped if name == BEV else each))) for name in wanted}
        if sum(counts.values()) > self.num_tokens - 1:
            raise ConfigError("hides every token", where=self.name, expected=f"fewer than {self.num_tokens}",
                              found=counts, fix="Lower mae.ratio or mae.sensor_ratio")
        return counts

    def arrays(self, samples: Samples, index: Index, rngs: Sequence[Generator]) -> Mapping[str, Arrays]:
        """Kind `mae`: the tokens hidden in each way, and `keep`, those that go through the transformer."""
        rest = self.num_tokens - sum(self.counts.values())
        *hidden, rest_BK = random_parts(self.num_tokens, [*self.counts.values(), rest], rngs)
        found = dict(zip(self.counts, hidden, strict=True))
        kept = [part for name, part in found.items() if name != BEV]
        return {KIND: arrays_of(keep=np.sort(np.concatenate([rest_BK, *kept], axis=1), axis=1), **found)}

    @property
    def unmirrored(self) -> frozenset[str]:
        """Token numbers are drawn at random anyway."""
        return frozenset({KIND})

    def losses(self, teacher: nn.Module, batch: Tensors) -> Losses:
        """See `Objective.losses`."""
        masks, inputs = batch[KIND], batch["inputs"]
        keep_BK, dropped_BM = masks["keep"], masks.get(BEV, masks["keep"][:, :0])
        shown = {name: blanked(x, places(self._hidden(name, masks), self.num_tokens)) for name, x in inputs.items()}
        state_BKD = backbone_of(teacher, where=self.name).tokens(
            *input_list(self.task.io, shown), keep_BK=keep_BK if BEV in self.counts else None)
        filled_BNE = in_order(self.decoder(state_BKD, keep_BK, dropped_BM), torch.cat((keep_BK, dropped_BM), dim=1))
        found: Losses = {}
        for name, head in self.heads.items():
            hidden_BM = self._hidden(name, masks)
            predicted_BMF = head(rows_at(filled_BNE, hidden_BM)).float()
            found[name] = self._distance(name, predicted_BMF, patches_of(inputs[name], self.side).float(), hidden_BM)
        return {name: value / len(found) for name, value in found.items()}

    def _hidden(self, name: str, masks: dict[str, Tensor]) -> Tensor:
        """Places where input `name` is blanked."""
        ways = [masks[way] for way in (BEV, name) if way in self.counts]
        return torch.cat([*ways, masks["keep"][:, :0]], dim=1)

    def _distance(self, name: str, predicted_BMF: Tensor, patches_BNF: Tensor, hidden_BM: Tensor) -> Tensor:
        """The loss of one input's hidden patches; `patches_BNF` are the true ones, of all places."""
        if self.loss_of(name) == "patch":  # arXiv:2111.06377, section 4.1, reconstruction target
            wanted_BMF = rows_at(patches_BNF, hidden_BM)
            return F.mse_loss(predicted_BMF, F.layer_norm(wanted_BMF, wanted_BMF.shape[-1:]))
        prior: PlacePrior = self.priors[name]  # type: ignore[assignment]
        channels, cells = prior.mean_NCQ.shape[1:]
        prior.see(patches_BNF.reshape(len(patches_BNF), -1, channels, cells))
        wanted_BMCQ = rows_at(patches_BNF, hidden_BM).reshape(*hidden_BM.shape, channels, cells)
        predicted_BMCQ = predicted_BMF.reshape(*hidden_BM.shape, channels, cells)
        if self.loss_of(name) == "bce":
            return prior.entropy(predicted_BMCQ, wanted_BMCQ, hidden_BM, self.config.positive)
        return prior.squared(predicted_BMCQ, wanted_BMCQ, hidden_BM)

    def loss_of(self, name: str) -> str:
        """How the cells of input `name` are judged."""
        if self.config.loss != "auto":
            return self.config.loss
        spec = self.specs[name]
        return "bce" if spec.channels and spec.value_range == (0.0, 1.0) else "patch"


def in_order(rows_BND: Tensor, places_BN: Tensor) -> Tensor:
    """Rows sorted by their places: row n of the result stands at place n."""
    return rows_at(rows_BND, places_BN.argsort(dim=1))
