"""A few test samples with what each model said about them: the pictures of the report.

The choice depends on the samples alone, never on an output, so that every stage picks the same ones and nobody picks
the pretty ones.
"""

# N samples, B batch

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fmdeploy.arrays import Arrays
from fmdeploy.errors import DataError

if TYPE_CHECKING:
    from fmdeploy.artifact import Artifact
    from fmdeploy.draft import Draft
    from fmdeploy.evaluate.evaluation import Predict
    from fmdeploy.task import Samples

COUNT = 6
SEED = 0
SEPARATOR = "|"


def choose(samples: Samples, count: int = COUNT) -> npt.NDArray[np.int64]:
    """Numbers of `count` samples (fewer where there are fewer) that cover as many slices as they can, ascending.

    Greedy over a shuffle with a fixed seed: the next sample is the one that shows most slices not shown yet, from a
    group (simulation, drive) that was not taken where there is one.
    """
    order = np.random.default_rng(SEED).permutation(len(samples))
    labels = [np.asarray(values) for values in samples.slices.values()]
    groups = np.asarray(samples.groups)
    seen: list[set[object]] = [set() for _ in labels]
    taken: list[int] = []
    for _ in range(min(count, len(samples))):
        used = set(groups[taken].tolist())
        best = max(
            (i for i in order if i not in taken),
            key=lambda i: (groups[i] not in used, sum(v[i].item() not in s for v, s in zip(labels, seen, strict=True))),
        )
        taken.append(int(best))
        for values, shown in zip(labels, seen, strict=True):
            shown.add(values[best].item())
    return np.sort(np.asarray(taken, np.int64))


def save_examples(
    draft: Draft, predict: Predict, samples: Samples, *, count: int = COUNT, name: str = "examples"
) -> None:
    """Run `predict` on the chosen samples and write `<name>.safetensors`, keys `<sample id>|<output>`."""
    index = choose(samples, count)
    inputs, _ = samples.batch(index)
    outputs = predict(inputs)
    tensors = {
        f"{samples.ids[number]}{SEPARATOR}{output}": np.asarray(rows[k])
        for k, number in enumerate(index)
        for output, rows in outputs.items()
    }
    draft.write_tensors(f"{name}.safetensors", tensors)


def load_examples(artifact: Artifact, name: str = "examples") -> dict[str, Arrays]:
    """Sample id → outputs of that sample, without batch axis.

    Raises:
        ArtifactError: the artifact holds no such file.
        DataError: a key is not `<sample id>|<output>`.
    """
    found: dict[str, Arrays] = {}
    for key, value in sorted(artifact.tensors(f"{name}.safetensors").items()):
        sample, separator, output = key.rpartition(SEPARATOR)
        if not separator:
            raise DataError("holds a key that is not '<sample>|<output>'", where=f"{name}.safetensors", found=key)
        found.setdefault(sample, {})[output] = value
    return found
