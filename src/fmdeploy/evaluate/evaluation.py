"""One model judged on one set of samples, kept per sample so that slices and intervals need no second pass.

Legend: N samples, K statistics of one metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fmdeploy.errors import DataError
from fmdeploy.evaluate.metrics import Array, Arrays

if TYPE_CHECKING:
    from fmdeploy.artifact import Artifact
    from fmdeploy.draft import Draft
    from fmdeploy.task import Metric, Samples

Mask = npt.NDArray[np.bool_]
NO_SLICE = "none"  # the label of samples that an axis does not single out
Predict = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Evaluation:
    """Per-sample sufficient statistics of some metrics.

    Attributes:
        ids: Names of the samples, in order (N).
        groups: int64 (N,), the cluster a sample belongs to; samples of one simulation are not independent.
        slices: Axis name to (N,) labels: str arrays make one slice a value, bool arrays one slice. The label `none`
            makes no slice; an axis that has it gets one of everything else, `rare` beside `rare=cut-in`.
        stats: Metric name to float64 (N, K).
        data: What was evaluated, `<dataset digest>:<split>`; two evaluations compare only when this is equal.
    """

    ids: tuple[str, ...]
    groups: npt.NDArray[np.int64]
    slices: dict[str, npt.NDArray[np.generic]]
    stats: dict[str, Array]
    data: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def total(self, metric: Metric, mask: Mask | None = None) -> Array:
        """Return the summed statistics (K,) of `metric`, of the masked samples only."""
        if metric.name not in self.stats:
            raise DataError("the metric was not evaluated", expected=metric.name, found=", ".join(self.stats) or "none")
        rows = self.stats[metric.name]
        return np.asarray((rows if mask is None else rows[mask]).sum(axis=0))

    def value(self, metric: Metric, mask: Mask | None = None) -> float:
        """Return the metric's value; NaN where it is undefined, in particular without samples."""
        return float(metric.value(self.total(metric, mask)))

    def masks(self, axes: Iterable[str] | None = None) -> dict[str, Mask]:
        """Return every slice by name: `weather=fog`; `rare` for a bool axis, or for any label but `none` of an axis.

        Raises:
            DataError: There is no such axis.
        """
        found: dict[str, Mask] = {}
        for axis in self.slices if axes is None else axes:
            labels = self.slices.get(axis)
            if labels is None:
                raise DataError(f"no slice axis {axis!r}", expected=", ".join(self.slices), found=axis)
            if labels.dtype == np.bool_:
                found[axis] = labels.astype(np.bool_)
                continue
            values = [value for value in np.unique(labels) if str(value) != NO_SLICE]
            found.update({f"{axis}={value}": labels == value for value in values})
            if (labels.astype(np.str_) == NO_SLICE).any():
                found[axis] = np.asarray(labels.astype(np.str_) != NO_SLICE)
        return found

    def slice_values(self, metric: Metric) -> dict[str, float]:
        """Return the metric's value in every slice."""
        return {name: self.value(metric, mask) for name, mask in self.masks().items()}

    def save(self, draft: Draft, name: str) -> None:
        """Write `<name>.safetensors` (groups, statistics) and `<name>.json` (ids, slices) into an artifact's draft."""
        tensors = {f"stats.{metric}": rows for metric, rows in self.stats.items()}
        draft.write_tensors(f"{name}.safetensors", {"groups": self.groups, **tensors})
        slices = {axis: labels.tolist() for axis, labels in self.slices.items()}
        draft.write_json(f"{name}.json", {"data": self.data, "ids": list(self.ids), "slices": slices})

    @staticmethod
    def load(artifact: Artifact, name: str) -> Evaluation:
        """Read back what `save` wrote.

        Raises:
            DataError: The two files disagree in length.
        """
        header, tensors = artifact.json(f"{name}.json"), dict(artifact.tensors(f"{name}.safetensors"))
        groups = tensors.pop("groups").astype(np.int64)
        stats = {key.removeprefix("stats."): rows.astype(np.float64) for key, rows in tensors.items()}
        slices = {axis: np.asarray(labels) for axis, labels in header["slices"].items()}
        ids = tuple(header["ids"])
        for what, rows in {"groups": groups, **slices, **stats}.items():
            if len(rows) != len(ids):
                raise DataError(
                    f"{what} has the wrong length", where=f"{name}.safetensors", expected=len(ids), found=len(rows)
                )
        return Evaluation(ids, groups, slices, stats, str(header["data"]))


def pooled(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Several runs (seeds, draws) on the same samples as one evaluation; samples of one group stay in one cluster."""
    first = evaluations[0]
    return Evaluation(
        ids=tuple(f"{number}:{i}" for number, e in enumerate(evaluations) for i in e.ids),
        groups=np.concatenate([e.groups for e in evaluations]), slices={}, data=first.data,
        stats={name: np.concatenate([e.stats[name] for e in evaluations]) for name in first.stats},
    )


def data_key(digest: str, split: str) -> str:
    """Return the identity of a dataset's split, for `Evaluation.data`."""
    return f"{digest}:{split}"


def evaluate(
    predict: Predict, samples: Samples, metrics: Iterable[Metric], *, batch_size: int = 64, data: str = ""
) -> Evaluation:
    """Run `predict` over all samples in order and keep the per-sample statistics of every metric.

    Args:
        predict: Maps a batch of inputs (B, ...) to named outputs (B, ...).
        samples: What to evaluate on.
        metrics: Metrics with distinct names.
        batch_size: Samples a call; the result does not depend on it as long as `predict` does not.
        data: Identity of the samples, `<dataset digest>:<split>`.

    Raises:
        DataError: There are no samples, or an output has another batch size than the inputs.
    """
    if len(samples) == 0:
        raise DataError("there is nothing to evaluate", expected="at least one sample", found=0)
    wanted = tuple(metrics)
    rows: dict[str, list[Array]] = {metric.name: [] for metric in wanted}
    for start in range(0, len(samples), batch_size):
        index = np.arange(start, min(start + batch_size, len(samples)))
        inputs, targets = samples.batch(index)
        outputs = predict(inputs)
        _check_outputs(outputs, len(index))
        for metric in wanted:
            rows[metric.name].append(metric.statistics(outputs, targets))
    stats = {name: np.concatenate(parts) for name, parts in rows.items()}
    return Evaluation(tuple(samples.ids), np.asarray(samples.groups, np.int64), dict(samples.slices), stats, data)


def _check_outputs(outputs: Mapping[str, npt.NDArray[np.generic]], expected: int) -> None:
    for name, array in outputs.items():
        if len(array) != expected:
            raise DataError(f"output {name!r} has the wrong batch size", expected=expected, found=len(array))
