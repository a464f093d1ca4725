"""Section of example predictions: the same few test samples through every model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fmdeploy.errors import DataError
from fmdeploy.evaluate.examples import choose
from fmdeploy.evaluate.metrics import softmax
from fmdeploy.evaluate.plots.raster import data_uri
from fmdeploy.evaluate.report.sources import Sources
from fmdeploy.iospec import IOSpec
from fmdeploy.task import Arrays, Samples, Task

COLUMNS = ("teacher", "student", "int8")
NONE = "none"  # the label of a sample to which a slicing does not apply
TITLES = {"teacher": "teacher", "student": "student", "int8": "INT8"}


@dataclass(frozen=True)
class Cell:
    """One picture and the words under it; an empty `uri` has words only."""

    uri: str
    alt: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """One test sample: a cell a column, in the order of the titles; None where a model has no output for it."""

    id: str
    labels: tuple[str, ...]
    cells: tuple[Cell | None, ...]


def panels_section(sources: Sources) -> tuple[list[str], list[Example]] | str:
    """Column titles and examples, or why there are none."""
    if sources.task is None or sources.data is None:
        return "no DATASET, so inputs and truth are not at hand"
    samples = sources.samples()
    assert samples is not None
    given = ((look, sources.model(look)) for look in COLUMNS)
    outputs = {look: model.examples for look, model in given if model is not None and model.examples}
    numbers = _numbers(samples, outputs)
    titles = ["inputs", *(TITLES[look] for look in outputs), "truth"]
    return titles, [_example(sources.task, samples, number, outputs) for number in numbers]


def _numbers(samples: Samples, outputs: dict[str, dict[str, Arrays]]) -> list[int]:
    """Samples that the models stored; the standard choice where they stored none.

    Raises:
        DataError: a model stored examples that are not test samples of this dataset.
    """
    place = {name: k for k, name in enumerate(samples.ids)}
    stored = [name for examples in outputs.values() for name in examples]
    if foreign := [name for name in stored if name not in place]:
        raise DataError("an example is not a test sample of the given dataset", where=foreign[0])
    return sorted({place[name] for name in stored}) or choose(samples).tolist()


def _example(task: Task, samples: Samples, number: int, outputs: dict[str, dict[str, Arrays]]) -> Example:
    inputs, targets = samples.batch(np.array([number]))
    name = samples.ids[number]
    cells: list[Cell | None] = [_cell(task, _first(inputs), f"inputs of {name}", with_words=False)]
    for look, examples in outputs.items():
        values = examples.get(name)
        cells.append(None if values is None else _cell(task, values, f"{TITLES[look]} prediction for {name}"))
    cells.append(_cell(task, _first(targets), f"truth of {name}"))
    labels = tuple(_label(axis, values[number]) for axis, values in samples.slices.items())
    return Example(name, tuple(label for label in labels if label), tuple(cells))


def _first(values: Arrays) -> Arrays:
    return {name: array[0] for name, array in values.items()}


def _label(axis: str, value: object) -> str:
    if isinstance(value, (bool, np.bool_)):
        return axis if value else ""
    return "" if str(value) == NONE else str(value)


def _cell(task: Task, values: Arrays, alt: str, *, with_words: bool = True) -> Cell:
    words = tuple(_words(task.io, values)) if with_words else ()
    drawable = any(np.asarray(v).ndim >= 2 for v in values.values())
    said = f"{alt}: {'; '.join(words)}" if words else alt
    return Cell(data_uri(task.panel(values)) if drawable else "", said, words)


def _words(io: IOSpec, values: Arrays) -> Iterator[str]:
    """Class labels in words: of logits the likeliest with its probability, of integers the label itself."""
    for name, value in values.items():
        known = next((o.channels for o in io.outputs if o.name == name), ())
        array = np.asarray(value)
        if array.ndim == 1 and array.dtype.kind == "f":
            best = int(array.argmax())
            yield f"{name}: {known[best] if known else best} ({float(softmax(array[None])[0, best]):.2f})"
        elif array.ndim == 0 and array.dtype.kind in "iu":
            number = int(array)
            yield f"{name}: {known[number] if number < len(known) else number}"
