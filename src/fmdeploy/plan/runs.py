"""The user's own small runs, as a CSV file: params, tokens, loss."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.errors import DataError

COLUMNS = ("params", "tokens", "loss")
MIN_RUNS = 6
MIN_SIZES = 3


@dataclass(frozen=True)
class Runs:
    """Finished training runs, each float64 (R,): parameters, tokens seen, final held-out loss."""

    params: Array
    tokens: Array
    loss: Array

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, index: Array) -> Runs:
        """Some of the runs, repeated where `index` repeats."""
        return Runs(self.params[index], self.tokens[index], self.loss[index])


def read_runs(path: Path) -> Runs:
    """Read a CSV file with the columns params, tokens and loss; others are ignored.

    Raises:
        DataError: the file cannot be read, a column or a number is missing or not above 0, or the runs are too few or
            too alike to fit.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            names = [(name or "").strip() for name in reader.fieldnames or ()]
            if missing := [name for name in COLUMNS if name not in names]:
                raise DataError(f"has no column {missing[0]!r}", where=path, expected=",".join(COLUMNS),
                                found=",".join(names) or "an empty file")
            if twice := [name for name in COLUMNS if names.count(name) > 1]:
                raise DataError(f"has two columns {twice[0]!r}", where=path, found=",".join(names))
            reader.fieldnames = names
            rows = [[_number(row[name], name, reader.line_num, path) for name in COLUMNS] for row in reader]
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"is not a CSV file: {error}", where=path) from error
    return _checked(np.array(rows, np.float64).reshape(-1, len(COLUMNS)), path)


def _number(text: str | None, name: str, line: int, path: Path) -> float:
    try:
        value = float((text or "").strip())
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise DataError(f"line {line}: {name} is not a number above 0", where=path, found=(text or "nothing")[:40])
    return value


def _checked(rows_R3: Array, path: Path) -> Runs:
    if len(rows_R3) < MIN_RUNS:
        raise DataError("too few runs for a fit of five numbers", where=path, expected=f"at least {MIN_RUNS}",
                        found=len(rows_R3), fix="Add runs of other sizes")
    for column, name in ((0, "params"), (1, "tokens")):
        if (count := len(np.unique(rows_R3[:, column]))) < MIN_SIZES:
            raise DataError(f"the runs do not differ enough in {name}: its exponent cannot be told", where=path,
                            expected=f"at least {MIN_SIZES} different values", found=count)
    return Runs(*rows_R3.T)
