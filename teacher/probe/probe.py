"""`teacher probe`: what the representation of a network is good for, in one table and one JSON."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath, OutputPath, Positional, StageConfig
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.draft import Draft, produce
from fmdeploy.manifest import Kind
from fmdeploy.teacher.probe.base import Bench, Result, View
from fmdeploy.teacher.probe.ladder import climb
from fmdeploy.teacher.probe.loading import KINDS, open_subject, random_subject
from fmdeploy.teacher.probe.registry import RUNGS, rungs_of
from fmdeploy.teacher.probe.table import table
from fmdeploy.teacher.probe.view import SplitChoice

PROBE, TABLE = "probe.json", "table.md"


class ProbeConfig(StageConfig):
    """Options of `fmdeploy teacher probe`."""

    model: Annotated[InputPath, Positional()] = Field(description="TEACHER, STUDENT, QUANTIZED or BUNDLE")
    data: InputPath = Field(description="DATASET: probes are trained on train, tuned on val, judged on test")
    out: OutputPath | None = Field(default=None, description="Where the PROBE is written; default: nowhere")
    rungs: tuple[str, ...] = Field(default=(), description=(
        "names, also several with commas; default: all but the few-shot ones. docs/probes.md lists them"))
    check: InputPath | None = Field(default=None, description="CHECK of its bundle, for the deployment rungs")
    tier: str | None = Field(default=None, description="tier of a BUNDLE: int8-cpu or fp32")
    layer: str | None = Field(default=None, description=(
        "module whose map is probed, where there is no backbone of tokens; default: the task's choice"))
    random: bool = Field(default=True, description="measure the same architecture at random initialisation beside it")
    train_samples: int = Field(default=1500, ge=1, description="most train samples, drawn by seed")
    val_samples: int = Field(default=600, ge=1, description="most val samples")
    test_samples: int = Field(default=1500, ge=1, description="most test samples")
    few_shot_steps: int = Field(default=100, ge=1, description="optimiser steps of the few-shot rungs")
    seed: int = Field(default=0, ge=0, lt=2**31, description="of the draw of samples, random weights and resampling")

    def names(self) -> tuple[str, ...]:
        """The wanted rungs one by one."""
        return tuple(name.strip() for text in self.rungs for name in text.split(",") if name.strip())


@command(ProbeConfig)
def probe(config: ProbeConfig) -> Outcome:
    """Climb the probe ladder; exit 1 when a rung that was asked for by name was not measured.

    Raises:
        ArtifactError: an input is not what it should be.
        ConfigError: no such rung, tier or layer.
    """
    rungs_of(config.names())  # a typing error is told before anything is opened
    model, data = open_artifact(config.model, *KINDS), open_dataset(config.data)
    check = open_artifact(config.check, Kind.CHECK) if config.check is not None else None
    if config.out is None:
        return _outcome(config, rows_of(climb(rungs_of(config.names()), _bench(config, model, data, check))))
    inputs = {"model": model, "data": data.artifact, **({"check": check} if check is not None else {})}
    artifact = produce(config.out, Kind.PROBE, stage="teacher probe", config=config, inputs=inputs,
                       build=lambda draft: _build(draft, config, model, data, check))
    said = f"{artifact.kind.value} {artifact.digest[:12]} at {artifact.root}"
    rows = artifact.json(PROBE)["rungs"]  # by name, as all JSON: the table has an order of its own
    return _outcome(config, {name: rows[name] for name in RUNGS if name in rows}, said)


def rows_of(results: dict[str, Result]) -> dict[str, dict[str, Any]]:
    """Rung → row of `probe.json`."""
    return {name: result.to_json() for name, result in results.items()}


def _bench(config: ProbeConfig, model: Artifact, data: Dataset, check: Artifact | None) -> Bench:
    subject = open_subject(model, tier=config.tier, layer=config.layer)
    limits = {"train": config.train_samples, "val": config.val_samples, "test": config.test_samples}
    choice = SplitChoice(subject.task, data, limits, config.seed)
    random = random_subject(model, layer=config.layer, seed=config.seed) if config.random else None
    return Bench(View(subject, choice), View(random, choice) if random is not None else None, check, config.seed,
                 config.few_shot_steps)


def _build(draft: Draft, config: ProbeConfig, model: Artifact, data: Dataset, check: Artifact | None) -> None:
    bench = _bench(config, model, data, check)
    rows = rows_of(climb(rungs_of(config.names()), bench))
    draft.write_json(PROBE, {
        "model": {"kind": model.kind.value, "digest": model.digest, "name": bench.view.subject.name},
        "data": data.digest, "rungs": rows,
    })
    draft.write_text(TABLE, "\n".join(table(rows)) + "\n")


def _outcome(config: ProbeConfig, rows: dict[str, dict[str, Any]], *more: str) -> Outcome:
    missing = config.names() and any(row["result"] != "measured" for row in rows.values())
    return Outcome((*table(rows), *more), rows, 1 if missing else 0)
