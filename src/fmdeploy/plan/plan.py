"""`fmdeploy plan`: what a run costs before it starts, and which size of model and data is worth its FLOPs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath
from fmdeploy.data.format import open_dataset
from fmdeploy.plan.cost import cost_of
from fmdeploy.plan.fit import Fit, fit_law
from fmdeploy.plan.laws import LAWS
from fmdeploy.plan.runs import read_runs
from fmdeploy.plan.samples import stand_in
from fmdeploy.plan.step import Subject
from fmdeploy.plan.tokens import effective_share, tokens_per_example
from fmdeploy.task import load_task
from fmdeploy.teacher.objectives.registry import choose, refuse_sharding
from fmdeploy.teacher.objectives.worldmodel import WorldModelConfig
from fmdeploy.teacher.sizes import TeacherSizes
from fmdeploy.training.config import StepConfig
from fmdeploy.training.device import resolve_precision

Json = dict[str, Any]
FITTING = ("law", "flops", "draws", "seed", "confidence")  # options of --fit


class PlanConfig(TeacherSizes, StepConfig):
    """A teacher's training run, or with --fit a table of finished ones."""

    task: str = Field(default="bev-occupancy", description="built-in task, or module:Class")
    objective: tuple[str, ...] = Field(default=("supervised",), min_length=1, description=(
        "NAME or NAME=WEIGHT as in teacher train; may be repeated"))
    set: tuple[str, ...] = Field(default=(), description="an objective's option, as NAME.KEY=VALUE; may be repeated")
    data: InputPath | None = Field(default=None, description=(
        "DATASET: its tokens, those left without duplicates, and the loss against its labels"))
    processes: int = Field(default=1, ge=1, description="processes that share the batch")
    fit: InputPath | None = Field(default=None, description="CSV (params,tokens,loss) of your own runs")
    law: Literal["chinchilla", "kaplan"] = Field(default="chinchilla", description="form of the scaling law")
    flops: float | None = Field(default=None, gt=6, description="budget for the compute-optimal pair, with --fit")
    draws: int = Field(default=200, ge=0, le=10_000, description="refits of resampled runs, for the intervals")
    seed: int = Field(default=0, ge=0, lt=2**31, description="of the refits")
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="two-sided coverage of the intervals")

    @model_validator(mode="after")
    def _agree(self) -> PlanConfig:
        if self.fit is not None and self.data is not None:
            raise ValueError("give either --fit or --data: they are two questions")
        given = [name for name in type(self).model_fields if name in self.model_fields_set and name != "fit"
                 and getattr(self, name) is not None]
        if self.fit is None and (idle := [name for name in given if name in FITTING]):
            raise ValueError(f"--{idle[0]} needs --fit: the law comes from your own runs")
        if self.fit is not None and (idle := [name for name in given if name not in FITTING]):
            raise ValueError(f"{idle[0]} is of a run to come, and --fit reads finished ones: leave it out")
        return self


@command(PlanConfig)
def plan(config: PlanConfig) -> Outcome:
    """Say what a training run takes before it starts, or fit a scaling law to runs that are done.

    Without --fit: parameters, tokens of an example, FLOPs and memory of the run, and with --data how many of its
    tokens are left without near-duplicates. With --fit: the law's numbers with intervals and, for --flops, the model
    and data size with the least loss.

    Raises:
        ConfigError: sizes that do not fit together.
        DataError: the runs cannot be read or are too few or too alike.
    """
    return _fit(config) if config.fit is not None else _cost(config)


def _fit(config: PlanConfig) -> Outcome:
    assert config.fit is not None
    found = fit_law(LAWS[config.law], read_runs(config.fit), draws=config.draws, seed=config.seed)
    data: Json = {**found.to_json(config.confidence), "law": config.law, "runs": found.num_runs,
                  "rms_log_loss": found.rms}
    if config.flops is not None:
        data["optimal"] = found.optimum(config.flops, config.confidence)
    return Outcome(tuple(_fit_lines(found, data, config.confidence)), data)


def _fit_lines(found: Fit, data: Json, confidence: float) -> Iterator[str]:
    yield (f"{data['law']} law from {found.num_runs} runs, {found.rms:.2%} rms of the loss; "
           f"{confidence:.0%} intervals from {len(found.draws)} refits")
    for name in found.law.names:
        yield f"  {name:8} {_spread(data[name])}"
    if "optimal" in data:
        best = data["optimal"]
        yield f"  best for {best['flops']:.3g} FLOPs: loss {best['loss']:.4f}"
        yield f"    parameters {_spread(best['params'])}"
        yield f"    tokens     {_spread(best['tokens'])}"


def _spread(number: Json) -> str:
    if number["low"] is None:
        return f"{number['value']:.4g} (interval not measured)"
    return f"{number['value']:.4g} [{number['low']:.4g}, {number['high']:.4g}]"


def _cost(config: PlanConfig) -> Outcome:
    config = config.model_copy(update={"precision": resolve_precision(config.precision)})
    task, choices = load_task(config.task), choose(config.objective, config.set)
    if config.sharding != "none":
        refuse_sharding(choices)
    samples = stand_in(task) if config.data is None else task.samples(open_dataset(config.data), "train")
    with torch.random.fork_rng(devices=[]):
        module = task.teacher(config.sizes())
        costs = cost_of(Subject(task, module, choices, samples), config, processes=config.processes)
    world = next((choice.config for choice in choices if isinstance(choice.config, WorldModelConfig)), None)
    tokens = tokens_per_example(task, module, world)
    data: Json = {"task": config.task, "tokens_per_example": tokens, **costs}
    data["run"] = {"examples": config.steps * config.batch,
                   "tokens": config.steps * config.batch * (tokens["patches"] or tokens["cells"])}
    if config.data is not None:
        data["data"] = _data(config, tokens)
    return Outcome(tuple(_cost_lines(data, config)), data)


def _data(config: PlanConfig, tokens: dict[str, int]) -> Json:
    assert config.data is not None
    opened = open_dataset(config.data)
    samples = len(load_task(config.task).samples(opened, "train"))
    unit = tokens["patches"] or tokens["cells"]
    found = effective_share(opened, "train")
    return {"samples": samples, "tokens": samples * unit, "near_duplicates": found,
            "effective_tokens": round(samples * unit * found["share"]),
            "epochs": round(config.steps * config.batch / samples, 3)}


def _cost_lines(data: Json, config: PlanConfig) -> Iterator[str]:
    tokens, flops = data["tokens_per_example"], data["flops"]
    own = "".join(f", {found['params']:,} of {name}" for name, found in data["objectives"].items() if found["params"])
    yield f"{data['params']:,} parameters of the teacher{own}; {data['trainable']:,} are trained"
    yield "  an example: " + ", ".join(f"{value:,} {name}" for name, value in tokens.items() if value)
    yield (f"  FLOPs: {flops['forward_per_sample']:.3g} forward, {flops['per_sample']:.3g} a sample in training, "
           f"{flops['run']:.3g} for {config.steps} steps of {config.batch}")
    if len(data["phases"]) > 1:
        yield "    " + ", then ".join(f"{phase['steps']} steps of {phase['flops_per_sample']:.3g} a sample"
                                      for phase in data["phases"])
    yield from _memory_lines(data["memory_mib"], data["processes"])
    if any("computed" in phase["counted"] for phase in data["phases"]):
        yield "  FLOPs and activations follow from three small steps that were computed"
    yield f"  not counted: {'; '.join(data['not_counted'])}"
    if "data" in data:
        found = data["data"]
        yield (f"  data: {found['samples']:,} samples, {found['tokens']:,} tokens, {found['effective_tokens']:,} "
               f"without near-duplicates ({found['near_duplicates']['method']}); the run is {found['epochs']} epochs")


def _memory_lines(memory: Json, processes: int) -> Iterator[str]:
    parts = ", ".join(f"{name} {value:.1f}" for name, value in memory.items()
                      if name not in ("step", "checkpoint", "total") and value)
    who = "the first process" if processes > 1 else "the process"
    yield f"  memory of {who}: {memory['step']:.1f} MiB in a step ({parts})"
    yield f"    {memory['checkpoint']:.1f} MiB while it writes a checkpoint, {memory['total']:.1f} at most"
