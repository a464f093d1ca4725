"""`--mixture`, `--replay`: what a run sees, as options, as samples and as rates.

Legend: N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from fmdeploy.arrays import Array
from fmdeploy.artifact import Artifact
from fmdeploy.config import InputPath, StageConfig
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.leakage import refuse_held_out
from fmdeploy.data.sequence import SequenceInfo
from fmdeploy.errors import ConfigError
from fmdeploy.subset import Subset
from fmdeploy.task import Samples, Task
from fmdeploy.training.labelled import labelled_index
from fmdeploy.training.mixture.joined import DOMAIN, Joined, replay_buffer
from fmdeploy.training.mixture.rates import rates_of
from fmdeploy.training.mixture.recipe import MixtureRecipe, read_recipe
from fmdeploy.training.mixture.sampler import MixtureSampler
from fmdeploy.training.sampler import Index, Sampler, make_sampler

NEW = "new"
WEIGHT = "sample_weight"  # a target that the task's loss weighs samples by


class MixtureConfig(StageConfig):
    """Options of stages that choose what they see."""

    mixture: InputPath | None = Field(default=None, description="TOML: how often what is seen (docs/mixture.md)")
    replay: tuple[InputPath, ...] = Field(default=(), description="DATASET of an old domain to still see; repeatable")
    replay_share: float = Field(default=0.25, gt=0, lt=1, description="share of all draws from the old domains")
    replay_samples: int | None = Field(default=None, ge=1, description="size of the buffer of each; default: all")

    @model_validator(mode="after")
    def _replay_needs_data(self) -> MixtureConfig:
        if self.replay_samples is not None and not self.replay:
            raise ValueError("replay_samples needs --replay")
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


def open_replay(paths: Sequence[Path], data: Dataset) -> tuple[Dataset, ...]:
    """The old domains' datasets, none of which trains on what `data` holds out.

    Raises:
        LeakageError: one does.
    """
    judged = [s for split in ("val", "test") if data.splits.get(split) for s in data.split(split)]
    replay = tuple(open_dataset(path) for path in paths)
    for old in replay:
        refuse_held_out(old.split("train"), judged, old.artifact.root)
    return replay


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
    """

    samples: Samples
    rate_N: Array | None = None
    importance: bool = False

    def sampler(self, batch: int, seed: int, index: Index | None = None) -> Sampler:
        """The order, of all samples or of those in `index`."""
        if self.rate_N is None:
            return make_sampler(self.samples, batch, seed, index)
        chosen = np.arange(len(self.samples)) if index is None else index
        rate_N = self.rate_N[chosen]
        return MixtureSampler(rate_N / rate_N.mean(), batch, seed, chosen, getattr(self.samples, "blocks", None))

    def labelled(self, share: float, seed: int) -> Index | None:
        """Numbers of the samples whose labels are used: `share` of the new domain's groups, and all old ones."""
        if share >= 1:
            return None
        new = self.samples.parts[0] if isinstance(self.samples, Joined) else self.samples
        return np.concatenate([labelled_index(new, share, seed), np.arange(len(new), len(self.samples))])

    def weights(self, index: Index, among: Index | None = None) -> Array | None:
        """float32 (B,) of the loss: 1 / rate where it is to stay that of the natural distribution, else None.

        Args:
            index: Samples of a batch.
            among: All that were drawn from, over whose draws the weights average 1; None: all samples.
        """
        if self.rate_N is None or not self.importance:
            return None
        mean = 1.0 if among is None else float(self.rate_N[among].mean())
        return np.asarray(mean / self.rate_N[index], np.float32)


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
            task whose loss does not know them.
    """
    recipe, samples = config.recipe(), task.samples(data, "train")
    if not labels and not recipe.is_natural and recipe.representation == "natural":
        raise ConfigError("objectives without labels learn at natural frequency", where="mixture",
                          fix='Leave the mixture out, or set representation = "mixture" in it')
    if recipe.importance and not labels:
        raise ConfigError("importance weights belong to the loss against labels, and none is read", where="mixture",
                          fix="Set importance = false in it")
    if recipe.importance and not task.weighs_samples:
        raise ConfigError("the task's loss takes no sample weights", where=f"task {task.name}",
                          fix="Set weighs_samples = True in a task whose loss honours targets['sample_weight']")
    sequences: list[SequenceInfo] = list(data.sequences)
    if replay:
        parts = {NEW: samples, **{f"old{k}": _buffer(config, task, old, seed) for k, old in enumerate(replay)}}
        samples = Joined(parts)
    rate_N = None if recipe.is_natural else rates_of(recipe, samples, sequences)
    if replay:
        rate_N = _with_share(rate_N, np.asarray(samples.slices[DOMAIN]), config.replay_share)
    return Mixture(samples, rate_N, recipe.importance)


def _buffer(config: MixtureConfig, task: Task, old: Dataset, seed: int) -> Samples:
    samples = task.samples(old, "train")
    return samples if config.replay_samples is None else Subset(
        samples, replay_buffer(samples, config.replay_samples, seed))


def _with_share(rate_N: Array | None, domain_N: Array, share: float) -> Array:
    """Rates such that the old domains together get `share` of the draws; within each side as before."""
    rate_N = np.ones(len(domain_N)) if rate_N is None else rate_N.copy()
    old_N = domain_N != NEW
    for side, part in ((old_N, share), (~old_N, 1 - share)):
        rate_N[side] *= part * len(domain_N) / rate_N[side].sum()
    return rate_N
