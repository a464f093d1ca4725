"""`--mixture`, `--replay`: what a run sees, as options, as samples and as rates.

Legend: N samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from fmdeploy.arrays import Array
from fmdeploy.artifact import Artifact
from fmdeploy.config import InputPath, StageConfig
from fmdeploy.data.format import Dataset
from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.errors import ConfigError
from fmdeploy.subset import Subset
from fmdeploy.task import Samples, Task
from fmdeploy.training.labelled import labelled_index
from fmdeploy.training.mixture.draws import Draws
from fmdeploy.training.mixture.joined import DOMAIN, Joined, replay_buffer
from fmdeploy.training.mixture.rates import bounded, rates_of, with_share
from fmdeploy.training.mixture.recipe import MixtureRecipe, read_recipe
from fmdeploy.training.sampler import Index

NEW = "new"


class MixtureConfig(StageConfig):
    """Options of stages that choose what they see."""

    mixture: InputPath | None = Field(default=None, description="TOML: how often what is seen (docs/mixture.md)")
    replay: tuple[InputPath, ...] = Field(default=(), description="DATASET of an old domain to still see; repeatable")
    replay_share: float = Field(default=0.25, gt=0, lt=1, description="share of all draws from the old domains")
    replay_samples: int | None = Field(default=None, ge=1, description="size of the buffer of each; default: all")

    @model_validator(mode="after")
    def _replay_needs_data(self) -> MixtureConfig:
        for name in ("replay_share", "replay_samples"):
            if name in self.model_fields_set and getattr(self, name) is not None and not self.replay:
                raise ValueError(f"{name} needs --replay")
        return self

    def resolved(self) -> dict[str, Any]:
        """With the content of the mixture in place of its path; without what is not in use."""
        found = super().resolved()
        if not self.replay:
            found = {name: value for name, value in found.items() if not name.startswith("replay")}
        return {**found, **({"mixture": self.recipe().to_json()} if self.mixture else {})}

    def recipe(self) -> MixtureRecipe:
        """The mixture; a natural one where none is given."""
        return read_recipe(self.mixture) if self.mixture else MixtureRecipe()


def replay_inputs(replay: Sequence[Dataset]) -> dict[str, Artifact]:
    """Their roles in a manifest."""
    return {f"replay{number}": data.artifact for number, data in enumerate(replay)}


@dataclass(frozen=True)
class Mixture:
    """What a run sees and how often.

    Attributes:
        samples: Of all domains.
        rate_N: float64 (N,), mean 1; None where everything is seen equally often.
        importance: Whether the loss undoes the rates.
        replay_share: Of all draws, those from old domains; None: there are none.
        most: Bound on the rates where only some samples are drawn from; None: the recipe sets none.
    """

    samples: Samples
    rate_N: Array | None = None
    importance: bool = False
    replay_share: float | None = None
    most: float | None = None

    def draws(self, index: Index | None = None) -> Draws:
        """What is drawn: of all samples, or of those in `index`.

        Fewer labels of the new domain change neither the old ones' share of the draws nor what bounds the rates.

        Raises:
            ConfigError: the bound does not allow that share there.
        """
        if self.rate_N is None:
            return Draws(self.samples, index)
        rate_N, chosen = self.rate_N.copy(), np.arange(len(self.rate_N)) if index is None else index
        if len(chosen) < len(rate_N):
            rate_N[chosen] = self._rates_among(rate_N[chosen], chosen)
        return Draws(self.samples, index, rate_N / rate_N[chosen].mean(), self.importance)

    def labelled(self, share: float, seed: int) -> Index | None:
        """Numbers of the samples whose labels are used: `share` of the new domain's groups, and all old ones."""
        if share >= 1:
            return None
        return np.concatenate([labelled_index(self.new, share, seed), np.arange(len(self.new), len(self.samples))])

    def supervision(self, index: Index | None) -> dict[str, int]:
        """How many samples of the new domain there are, and of how many the labels are used.

        Args:
            index: From `labelled`.
        """
        of = len(self.new)
        return {"samples": of if index is None else int((index < of).sum()), "of": of}

    @property
    def new(self) -> Samples:
        """Those of the new domain, which are the first ones."""
        return self.samples.parts[0] if isinstance(self.samples, Joined) else self.samples

    def _rates_among(self, rate_N: Array, among: Index) -> Array:
        old_N = among >= len(self.new)
        if self.replay_share is not None and not old_N.all():
            return with_share(rate_N, old_N, self.replay_share, self.most)
        return rate_N if self.most is None else bounded(rate_N, self.most)


def mix(
    config: MixtureConfig, task: Task, data: Dataset, replay: Sequence[Dataset], seed: int, *, labels: bool = True
) -> Mixture:
    """The training samples of `data` and of the old domains, and how often each is seen.

    Args:
        config: Recipe and shares.
        task: Reads the samples.
        data: The new domain.
        replay: The old ones.
        seed: Of the buffers.
        labels: Whether an objective reads labels; one without learns at natural frequency unless the recipe says so.

    Raises:
        ConfigError: axes or values that are nowhere, weights for an objective without labels, importance weights for a
            task whose loss does not know them, a share of replay that the recipe's bound does not allow.
    """
    recipe, samples = config.recipe(), task.samples(data, "train")
    _refuse_unused(recipe, task, labels=labels)
    sequences: list[SequenceInfo] = list(data.sequences)
    if replay:
        parts = {NEW: samples, **{f"old{k}": _buffer(config, task, old, seed) for k, old in enumerate(replay)}}
        samples = Joined(parts)
        # Under the names that joined samples have, or no key of the metadata would be found.
        sequences = [dataclasses.replace(sequence, id=f"{name}:{sequence.id}")
                     for name, each in zip(parts, (data, *replay), strict=True) for sequence in each.sequences]
    rates = rates_of(recipe, samples, sequences) if recipe.used_axes() else None  # also to refuse a misspelled axis
    rate_N = None if recipe.is_natural else rates
    most = recipe.max_oversampling if recipe.is_bounded else None
    if replay:
        natural_N = np.ones(len(samples)) if rate_N is None else rate_N
        rate_N = with_share(natural_N, np.asarray(samples.slices[DOMAIN]) != NEW, config.replay_share, most)
    return Mixture(samples, rate_N, recipe.importance, config.replay_share if replay else None, most)


def _refuse_unused(recipe: MixtureRecipe, task: Task, *, labels: bool) -> None:
    """Refuse what the loss would not heed."""
    if not labels and not recipe.is_natural and recipe.representation == "natural":
        raise ConfigError("objectives without labels learn at natural frequency", where="mixture",
                          fix='Leave the mixture out, or set representation = "mixture" in it')
    if recipe.importance and not labels:
        raise ConfigError("importance weights belong to the loss against labels, and none is read", where="mixture",
                          fix="Set importance = false in it")
    if recipe.importance and not task.weighs_samples:
        raise ConfigError("the task's loss takes no sample weights", where=f"task {task.name}",
                          fix="Set weighs_samples = True in a task whose loss honours targets['sample_weight']")


def _buffer(config: MixtureConfig, task: Task, old: Dataset, seed: int) -> Samples:
    samples = task.samples(old, "train")
    return samples if config.replay_samples is None else Subset(
        samples, replay_buffer(samples, config.replay_samples, seed))
