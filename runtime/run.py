"""`fmdeploy run`: a bundle over a dataset, to a folder with predictions and one record a frame.

    predictions.safetensors   output name → float32 (N, ...); NaN where a frame has no output
    frames.jsonl              one JSON object a frame, in the same order, with its sample id
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from fmdeploy.arrays import Arrays
from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath, OutputPath, Positional, RunOnly, StageConfig
from fmdeploy.data.format import open_dataset
from fmdeploy.errors import ArtifactError, FrameError
from fmdeploy.progress import progress
from fmdeploy.runtime.bundle import Bundle, open_bundle
from fmdeploy.runtime.frame import Frame
from fmdeploy.runtime.guards.content import SAMPLES
from fmdeploy.runtime.session import Runtime
from fmdeploy.runtime.tiers import TIERS
from fmdeploy.task import Samples, load_task

BATCH = 64


class RunConfig(StageConfig):
    """Options of `fmdeploy run`."""

    bundle: Annotated[InputPath, Positional()] = Field(description="Folder of a BUNDLE")
    data: InputPath = Field(description="Folder of a DATASET")
    out: OutputPath = Field(description="Folder to write; must not exist")
    split: str = Field(default="test", description="Split to run: train, val, test or all")
    task: str = Field(default="", description="Task that reads the dataset; default: the bundle's")
    tiers: tuple[str, ...] = Field(default=TIERS, min_length=1, description="Variants to try, best first")
    threads: Annotated[int, RunOnly()] = Field(default=1, ge=1, le=256, description="Threads inside one run")
    keep_going: bool = Field(default=False, description="Record frames that are not valid instead of stopping")


@command(RunConfig)
def run(config: RunConfig) -> Outcome:
    """Run a bundle over a dataset: predictions and one record a frame, or nothing."""
    bundle = open_bundle(config.bundle)
    data = open_dataset(config.data)
    samples = load_task(task_name(bundle, config.task)).samples(data, config.split)
    runtime = Runtime(bundle, tiers=config.tiers, threads=config.threads, guards=SAMPLES)
    with scratch_folder(config.out) as folder:
        invalid = _write(folder, runtime, samples, keep_going=config.keep_going)
    found = {"out": str(config.out), "frames": len(samples), "invalid": invalid, "tier": runtime.tier,
             "tiers": [report.to_json() for report in runtime.reports], "bundle": bundle.digest, "data": data.digest}
    lines = [f"{len(samples)} frames on {runtime.tier}, {invalid} not valid, at {config.out}"]
    lines += [f"  {r.variant}: {r.reason}" for r in runtime.reports if not r.admitted]
    return Outcome(tuple(lines), found)


def task_name(bundle: Bundle, given: str) -> str:
    """Return the task to use: the one given, or the one the bundle was made for.

    Raises:
        ArtifactError: Neither says.
    """
    artifact = bundle.artifact
    recipe = artifact.json("model.json") if artifact.has("model.json") else artifact.manifest.config
    name = given or str(recipe.get("task", ""))
    if not name:
        raise ArtifactError("does not say which task it is for", where=bundle.artifact.root, fix="Name it with --task")
    return name


def frames_of(samples: Samples) -> Iterator[tuple[str, Arrays]]:
    """Yield the id and the inputs of every sample, in order, without batch axis."""
    for start in range(0, len(samples), BATCH):
        index = np.arange(start, min(start + BATCH, len(samples)))
        inputs, _ = samples.batch(index)
        for row, number in enumerate(index):
            yield samples.ids[int(number)], {name: array[row] for name, array in inputs.items()}


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Give a scratch folder that becomes `out` in one rename, or vanishes.

    Raises:
        ArtifactError: Something is at `out` already.
    """
    if os.path.lexists(out):
        raise ArtifactError("already exists", where=out, fix="Choose another --out")
    scratch = out.parent / f".{out.name}.{os.getpid()}.partial"
    scratch.mkdir(parents=True)
    try:
        yield scratch
        os.rename(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(folder: Path, runtime: Runtime, samples: Samples, *, keep_going: bool) -> int:
    from safetensors.numpy import save_file

    specs = runtime.bundle.io.outputs
    outputs = {spec.name: np.full((len(samples), *spec.shape), np.nan, np.float32) for spec in specs}
    invalid = 0
    with (folder / "frames.jsonl").open("w", encoding="utf-8") as stream, progress("run", total=len(samples)) as bar:
        for row, (name, inputs) in enumerate(frames_of(samples)):
            frame = _infer(runtime, name, inputs)
            if not frame.valid and not keep_going:
                text = "; ".join(f"{found.code.value} {found.detail}" for found in frame.findings)
                raise FrameError(text, where=f"sample {name}", fix="Use --keep-going to record such frames instead")
            invalid += not frame.valid
            for key, array in frame.outputs.items():
                outputs[key][row] = array
            stream.write(json.dumps({"id": name, **frame.record()}, sort_keys=True) + "\n")
            bar.advance()
    save_file(outputs, folder / "predictions.safetensors")
    return invalid


def _infer(runtime: Runtime, name: str, inputs: Arrays) -> Frame:
    try:
        return runtime.infer(inputs)
    except FrameError as error:
        raise FrameError(str(error), where=f"sample {name}") from error

