"""`fmdeploy run`: a bundle over a dataset. --json prints one line a frame as it comes, --out keeps a folder.

    predictions.safetensors   output name → float32 (N, ...); NaN where a frame has no output
    frames.jsonl              one JSON object a frame, in the same order, with its sample id
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from fmdeploy.arrays import Arrays
from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath, OutputPath, Positional, RequiredKey, RunOnly, StageConfig
from fmdeploy.data.format import open_dataset
from fmdeploy.errors import ArtifactError, FrameError, MissingError
from fmdeploy.jsonlines import emit, somebody_listens
from fmdeploy.progress import progress
from fmdeploy.runtime.bundle import Bundle, open_bundle
from fmdeploy.runtime.frame import Frame
from fmdeploy.runtime.guards.content import SAMPLES
from fmdeploy.runtime.session import Runtime
from fmdeploy.runtime.state import INDEPENDENT
from fmdeploy.runtime.tiers import TIERS
from fmdeploy.task import Samples, load_task

BATCH = 64


class RunConfig(StageConfig):
    """Options of `fmdeploy run`."""

    bundle: Annotated[InputPath, Positional()] = Field(description="Folder of a BUNDLE")
    data: InputPath = Field(description="Folder of a DATASET")
    out: OutputPath | None = Field(default=None, description="Folder to write; must not exist")
    limit: int | None = Field(default=None, ge=1, description="Frames to run at most")
    split: str = Field(default="test", description="Split to run: train, val, test or all")
    task: str = Field(default="", description="Task that reads the dataset; default: the bundle's")
    tiers: tuple[str, ...] = Field(default=TIERS, min_length=1, description="Variants to try, best first")
    threads: Annotated[int, RunOnly()] = Field(default=1, ge=1, le=256, description="Threads inside one run")
    require_signature: RequiredKey = None
    keep_going: bool = Field(default=False, description="Record frames that are not valid instead of stopping")


@command(RunConfig)
def run(config: RunConfig) -> Outcome:
    """Run a bundle over a dataset. --json prints one line a frame; --out keeps predictions and records, or nothing."""
    bundle = open_bundle(config.bundle, require_signature=config.require_signature)
    data = open_dataset(config.data)
    samples = load_task(task_name(bundle, config.task)).samples(data, config.split)
    count = min(len(samples), config.limit or len(samples))
    with (
        Runtime(bundle, tiers=config.tiers, threads=config.threads, guards=SAMPLES, policy=INDEPENDENT) as runtime,
        scratch_folder(config.out) if config.out is not None else nullcontext() as folder,
    ):
        invalid = _run(folder, runtime, itertools.islice(frames_of(samples), count), count, config.keep_going)
    found = {"out": str(config.out) if config.out else None, "frames": count, "invalid": invalid, "tier": runtime.tier,
             "tiers": [report.to_json() for report in runtime.reports], "bundle": bundle.digest, "data": data.digest,
             "signature": bundle.signature.to_json()}
    where = f", at {config.out}" if config.out is not None else ""
    lines = [f"{count} frames on {runtime.tier}, {invalid} not valid{where}"]
    lines += [f"  {r.tier}: {r.reason}" for r in runtime.reports if not r.admitted]
    lines.append(f"  {bundle.signature.note()}")
    return Outcome(tuple(lines), None if somebody_listens() else found)


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


def _run(
    folder: Path | None, runtime: Runtime, frames: Iterator[tuple[str, Arrays]], count: int, keep_going: bool
) -> int:
    """Run all frames; return how many were not valid."""
    invalid = 0
    with _writer(folder, runtime, count) as write, progress("run", total=count) as bar:
        for row, (name, inputs) in enumerate(frames):
            frame = _infer(runtime, name, inputs)
            record = {"id": name, **frame.record()}
            emit(record)
            write(row, record, frame)
            invalid += not frame.valid
            if not runtime.health().live:
                raise MissingError(f"the device is lost: {_why(frame)}", where=f"sample {name}", fix="Start it again")
            if not frame.valid and not keep_going:
                fix = "Use --keep-going to record such frames instead"
                raise FrameError(_why(frame), where=f"sample {name}", fix=fix)
            bar.advance()
    return invalid


@contextmanager
def _writer(folder: Path | None, runtime: Runtime, count: int) -> Iterator[Callable[[int, object, Frame], None]]:
    """Give what keeps a frame: in the files of `folder`, or not at all."""
    if folder is None:
        yield lambda row, record, frame: None
        return
    from safetensors.numpy import save_file

    outputs = {spec.name: np.full((count, *spec.shape), np.nan, np.float32) for spec in runtime.bundle.io.outputs}
    with (folder / "frames.jsonl").open("w", encoding="utf-8") as stream:

        def write(row: int, record: object, frame: Frame) -> None:
            for key, array in frame.outputs.items():
                outputs[key][row] = array
            stream.write(json.dumps(record, sort_keys=True) + "\n")

        yield write
    save_file(outputs, folder / "predictions.safetensors")


def _why(frame: Frame) -> str:
    return "; ".join(f"{found.code.value} {found.detail}" for found in frame.findings)


def _infer(runtime: Runtime, name: str, inputs: Arrays) -> Frame:
    try:
        return runtime.infer(inputs)
    except FrameError as error:
        raise FrameError(str(error), where=f"sample {name}") from error

