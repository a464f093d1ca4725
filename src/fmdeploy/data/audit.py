"""`data audit`: does a split know anything that it must not?"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fmdeploy.artifact import open_artifact
from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath, Positional, StageConfig
from fmdeploy.data.format import SPLITS, Dataset, open_unchecked
from fmdeploy.data.hindsight import leaks_of_hindsight
from fmdeploy.data.leakage import Leak, leaks_of_splits
from fmdeploy.data.lookalikes import leaks_of_content
from fmdeploy.data.phash import signatures
from fmdeploy.data.telling import CONTEXT, telling_metadata
from fmdeploy.errors import DataError
from fmdeploy.manifest import MANIFEST_NAME, Kind

TRAINING = "train"
TRAINED = (Kind.TEACHER, Kind.STUDENT, Kind.QUANTIZED)
"""Artifacts whose score on the training split is that of training itself, and says so."""


class AuditConfig(StageConfig):
    """What to audit."""

    data: Annotated[InputPath, Positional()] = Field(description="A DATASET")
    against: tuple[Path, ...] = Field(
        default=(), description="Artifacts, or JSON files, whose calibration and evaluation samples are looked up"
    )
    content: bool = Field(default=True, description="Look at the frames and labels too, not at the metadata alone")
    context: tuple[str, ...] = Field(default=CONTEXT, description=(
        "Metadata that may well predict labels, since it says what was driven; 'id' is a key too"))
    limit: int = Field(default=20, ge=1, description="How many leaks are printed; --json holds all of them")


@dataclass(frozen=True)
class SampleList:
    """Samples that something else used: what for, and which."""

    source: str
    purpose: str
    """`calibration` or `evaluation`."""
    ids: tuple[str, ...]


@command(AuditConfig)
def audit(config: AuditConfig) -> Outcome:
    """Find leakage: shared sequences and seeds, neighbours, lookalikes, hindsight, telling metadata, misused samples.

    Exit code 1 where there is any. Calibration belongs to training data, evaluation never does: calibration samples of
    another split and evaluation samples of the training split are leaks. docs/leakage.md describes every trap.

    Raises:
        ArtifactError: the dataset is not one, or was altered.
        DataError: samples to look up are not in the dataset, or a date is none.
    """
    data = _in_pipeline_order(open_unchecked(config.data))
    leaks = [*leaks_of_splits(data.sequences, data.splits), *leaks_of_hindsight(data.sequences, data.splits)]
    leaks += _leaks_of_use(data, [used for path in config.against for used in sample_lists(path)])
    checked: dict[str, Any] = {"sequences": len(data.sequences)}
    if config.content:
        found = signatures(data)
        leaks += leaks_of_content(data, found)
        probed = telling_metadata(data, context=config.context)
        leaks += probed.leaks
        checked.update(hash=found.method, threshold_bits=found.threshold, frames=found.frames,
                       informative_frames=len(found.frame_S), probed_keys=len(probed.keys),
                       probed_labels=len(probed.labels))
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


def _leaks_of_use(data: Dataset, lists: Sequence[SampleList]) -> list[Leak]:
    """Samples that were used for what they must not be."""
    leaks = [leak for used in lists for leak in leaks_of_samples(data, used)]
    for one, other in product(lists, lists):
        if (one.purpose, other.purpose) == ("calibration", "evaluation"):
            both = sorted(set(one.ids) & set(other.ids))
            if both:
                why = f"calibrates in {one.source} and is scored in {other.source}"
                leaks.append(Leak("calibration and evaluation", tuple(both), why, (TRAINING,)))
    return leaks


def leaks_of_samples(data: Dataset, used: SampleList) -> list[Leak]:
    """Evaluation samples of the training split, or calibration samples of another, one leak a split.

    Raises:
        DataError: a sample's sequence is not in the dataset, so nothing can be said about it.
    """
    split_of = {sequence: name for name, ids in data.splits.items() for sequence in ids}
    known = {sequence.id for sequence in data.sequences}
    wrong: dict[str, list[str]] = defaultdict(list)
    for sample in used.ids:
        sequence = sample.rpartition("/")[0] or sample
        if sequence not in known:
            raise DataError(f"names the sample {sample}, which this dataset lacks", where=used.source,
                            fix="Audit the dataset that it was made from")
        split = split_of.get(sequence, "no split")
        if (split == TRAINING) == (used.purpose == "evaluation"):
            wrong[split].append(sample)
    why = f"{used.source} uses them for {used.purpose}"
    return [Leak(f"{used.purpose} sample", tuple(samples), why, (split,)) for split, samples in wrong.items()]


def _outcome(leaks: list[Leak], checked: dict[str, Any], limit: int) -> Outcome:
    data = [leak.to_json() for leak in leaks]
    seen = ", ".join(f"{name} {value}" for name, value in checked.items())
    if not leaks:
        return Outcome((f"no leakage found ({seen})",), data)
    lines = [leak.line() for leak in leaks[:limit]]
    if len(leaks) > limit:
        lines.append(f"... and {len(leaks) - limit} more (--limit, or --json for all)")
    total = ", ".join(f"{count} {trap}" for trap, count in Counter(leak.trap for leak in leaks).items())
    return Outcome((*lines, f"leakage: {len(leaks)} found ({total}; {seen})"), data, exit_code=1)
