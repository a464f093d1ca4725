"""Is an evaluation on samples that the model already knows? Then its numbers say nothing about the road."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fmdeploy.artifact import Artifact
from fmdeploy.data.format import Dataset
from fmdeploy.evaluate.gates import Result, Row, not_measured
from fmdeploy.manifest import Parent, ancestors_learnt_from, datasets_learnt_from

NAME = "evaluation samples seen in training or calibration"
TRAINING = "train"
JOIN = "data join"  # leaves every sequence in its split


def seen_row(bundle: Artifact, data: Dataset, ids: Sequence[str]) -> Row:
    """Return a row that fails when samples of the evaluation calibrated or trained what is in the bundle.

    Where the bundle was made from another division of the same recordings, nobody can say: manifests name datasets, not
    samples. That is not measured.

    Args:
        bundle: A BUNDLE; its calibration.json names samples, its lineage names datasets.
        data: What is evaluated on; its training split counts only where the bundle descends from this very dataset.
        ids: Names of the evaluated samples, `<sequence>/<frame>`.
    """
    calibrated = set(ids) & set(_calibration_samples(bundle))
    trained = set(ids) & set(_training_samples(bundle, data, ids))
    reasons = [f"{len(samples)} samples are of the {what}, such as {min(samples)}"
               for what, samples in (("calibration set", calibrated), ("training split", trained)) if samples]
    if not reasons and (others := _other_divisions(bundle, data)):
        reason = f"it was made from dataset {others[0][:12]}, another split of the same recordings"
        return not_measured(NAME, reason, limit=0.0, unit="samples", n_samples=len(ids))
    result = Result.FAIL if reasons else Result.PASS
    return Row(NAME, result, float(len(calibrated | trained)), 0.0, "samples", n_samples=len(ids),
               reason="; ".join(reasons))


def _calibration_samples(bundle: Artifact) -> list[str]:
    found = bundle.json("calibration.json") if bundle.has("calibration.json") else {}
    return [str(name) for name in found.get("samples", ())] if isinstance(found, dict) else []


def _training_samples(bundle: Artifact, data: Dataset, ids: Sequence[str]) -> list[str]:
    if data.digest not in {parent.digest for parent in ancestors_learnt_from(bundle.inputs)}:
        return []
    sequences = set(data.splits.get(TRAINING, ()))
    return [name for name in ids if (name.rpartition("/")[0] or name) in sequences]


def _other_divisions(bundle: Artifact, data: Dataset) -> list[str]:
    """Digests of datasets behind the bundle that divide recordings of `data` in another way."""
    own = {part.digest: _family(part) for part in _parts(data.artifact.parent())}
    family = {digest for each in own.values() for digest in each}
    return [part.digest for read in datasets_learnt_from(bundle.inputs) for part in _parts(read)
            if part.digest not in own and family & _family(part)]


def _parts(dataset: Parent) -> Iterator[Parent]:
    """Itself, or what was joined in it."""
    if dataset.stage != JOIN:
        yield dataset
    for part in dataset.inputs.values() if dataset.stage == JOIN else ():
        yield from _parts(part)


def _family(dataset: Parent) -> set[str]:
    return {dataset.digest, *(parent.digest for parent in ancestors_learnt_from(dataset.inputs))}
