"""`data audit`: is anything in two splits at once that must not be?"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from fmdeploy.artifact import open_artifact
from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath, StageConfig
from fmdeploy.data.format import SPLITS, Dataset, open_unchecked
from fmdeploy.data.leakage import Leak, leaks_of_keys, leaks_of_neighbours
from fmdeploy.data.lookalikes import leaks_of_content
from fmdeploy.data.phash import signatures
from fmdeploy.errors import DataError
from fmdeploy.manifest import MANIFEST_NAME, Kind

TRAINING = "train"
TRAINED = (Kind.TEACHER, Kind.STUDENT, Kind.QUANTIZED)
"""Artifacts whose score on the training split is that of training itself, and says so."""


class AuditConfig(StageConfig):
    """What to audit."""

    data: InputPath = Field(description="A DATASET")
    against: tuple[Path, ...] = Field(
        default=(), description="Artifacts, or JSON files, whose calibration and evaluation samples are looked up"
    )
    content: bool = Field(default=True, description="Compare the frames themselves, by perceptual hash")
    limit: int = Field(default=20, ge=1, description="How many pairs are printed; --json holds all of them")


@dataclass(frozen=True)
class SampleList:
    """Samples that something else used: what for, and which."""

    source: str
    purpose: str
    """`calibration` or `evaluation`."""
    ids: tuple[str, ...]


@command(AuditConfig)
def audit(config: AuditConfig) -> Outcome:
    """Find leakage between splits: shared sequences and seeds, neighbouring and near-duplicate frames, misused samples.

    Exit code 1 where there is any, with the pairs named. Calibration belongs to training data, evaluation never does:
    calibration samples of another split and evaluation samples of the training split are leaks.

    Raises:
        ArtifactError: the dataset is not one, or was altered.
        DataError: samples to look up are not in the dataset.
    """
    data = _in_pipeline_order(open_unchecked(config.data))
    leaks = [*leaks_of_keys(data.sequences, data.splits), *leaks_of_neighbours(data.sequences, data.splits)]
    for path in config.against:
        for used in sample_lists(path):
            leaks += leaks_of_samples(data, used)
    checked: dict[str, Any] = {"sequences": len(data.sequences)}
    if config.content:
        found = signatures(data)
        leaks += leaks_of_content(data, found)
        checked.update(hash=found.method, threshold_bits=found.threshold, frames=found.frames,
                       informative_frames=len(found.frame_S))
    return _outcome(leaks, checked, config.limit)


def _in_pipeline_order(data: Dataset) -> Dataset:
    """Leaks are reported as train against val, train against test, val against test."""
    names = [*(n for n in SPLITS if n in data.splits), *(n for n in data.splits if n not in SPLITS)]
    return replace(data, splits={name: data.splits[name] for name in names})


def sample_lists(path: Path) -> Iterator[SampleList]:
    """Samples named by an artifact's `calibration.json` and evaluations, or by a JSON file of the same form.

    Raises:
        ArtifactError: `path` is a folder but not an artifact.
        DataError: it names no samples at all.
    """
    files, may_score_training = [path], False
    if path.is_dir():
        artifact = open_artifact(path)
        may_score_training = artifact.kind in TRAINED
        files = [path / name for name in artifact.manifest.files if name.endswith(".json") and name != MANIFEST_NAME]
    lists = [used for file in files for used in _lists_in(file, may_score_training)]
    if not lists:
        raise DataError("names no calibration or evaluation samples", where=path,
                        fix="Give a QUANTIZED, a BUNDLE or a CHECK, or a JSON file with 'samples' or 'ids'")
    yield from lists


def _lists_in(file: Path, may_score_training: bool) -> Iterator[SampleList]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"is not JSON: {error}", where=file) from error
    if not isinstance(content, dict):
        return
    for purpose, key in (("calibration", "samples"), ("evaluation", "ids")):
        ids = content.get(key)
        honest = may_score_training and str(content.get("data", "")).endswith(f":{TRAINING}")
        if isinstance(ids, list) and all(isinstance(i, str) for i in ids) and not honest:
            yield SampleList(str(file), purpose, tuple(ids))


def leaks_of_samples(data: Dataset, used: SampleList) -> list[Leak]:
    """Evaluation samples of the training split, or calibration samples of another.

    Raises:
        DataError: a sample's sequence is not in the dataset, so nothing can be said about it.
    """
    split_of = {sequence: name for name, ids in data.splits.items() for sequence in ids}
    known = {sequence.id for sequence in data.sequences}
    leaks = []
    for sample in used.ids:
        sequence = sample.rpartition("/")[0] or sample
        if sequence not in known:
            raise DataError(f"names the sample {sample}, which this dataset lacks", where=used.source,
                            fix="Audit the dataset that it was made from")
        split = split_of.get(sequence, "no split")
        if (split == TRAINING) == (used.purpose == "evaluation"):
            leaks.append(Leak(f"{used.purpose} sample", sample, sequence, (used.purpose, split),
                              f"{used.source} uses a sample of {split!r} for {used.purpose}"))
    return leaks


def _outcome(leaks: list[Leak], checked: dict[str, Any], limit: int) -> Outcome:
    kinds = dict(Counter(leak.kind for leak in leaks))
    data = {"leaks": len(leaks), "kinds": kinds, "pairs": [leak.to_json() for leak in leaks], "checked": checked}
    seen = ", ".join(f"{name} {value}" for name, value in checked.items())
    if not leaks:
        return Outcome((f"no leakage found ({seen})",), data)
    lines = [leak.line() for leak in leaks[:limit]]
    if len(leaks) > limit:
        lines.append(f"... and {len(leaks) - limit} more (--limit, or --json for all)")
    total = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return Outcome((*lines, f"leakage: {len(leaks)} pairs ({total}; {seen})"), data, exit_code=1)
