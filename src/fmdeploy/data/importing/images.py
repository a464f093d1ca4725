"""A folder of images with a table of labels: CSV, JSON, or one folder a class.

The table's columns: `file` (relative to the folder), and of choice `label` (a class name or a number), `sequence`
(frames of one recording, in the order of the table), `split`, and anything else, which becomes metadata.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from fmdeploy.data.format import SPLITS
from fmdeploy.data.importing.drives import Drive, read_json, require_inside, safe_id
from fmdeploy.data.importing.pictures import SUFFIXES, decode_image
from fmdeploy.errors import DataError

Row = dict[str, Any]
OWN = ("file", "label", "sequence", "split")
MAX_CLASSES = 100_000
UNKNOWN = -1  # which losses and metrics of classes leave out
NUMBER = re.compile(r"0|[1-9][0-9]*")


def read_table(root: Path, table: Path | None) -> list[Row]:
    """Rows of the table of labels; without one, the images below `root` labelled by their first folder.

    Raises:
        DataError: a row names no file, a file is named twice, or there is nothing.
    """
    rows = _folders(root) if table is None else _json(table) if table.suffix == ".json" else _csv(table)
    where = table or root
    if not rows:
        raise DataError("names no images", where=where)
    seen: set[str] = set()
    for number, row in enumerate(rows, 2):
        if not row.get("file"):
            raise DataError(f"row {number} has no file", where=where, expected="a column file")
        if not isinstance(row["file"], str) or not isinstance(row.get("label"), (str, int, float, NoneType)):
            raise DataError(f"row {number}: the file is no text, or the label neither text nor a number", where=where)
        if row["file"] in seen:
            raise DataError(f"names {row['file']} twice", where=where)
        seen.add(str(row["file"]))
    return rows


def is_labelled(row: Row) -> bool:
    """Whether an image has a label."""
    return row.get("label") not in (None, "")


def _csv(table: Path) -> list[Row]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            return [{k.strip(): (v or "").strip() for k, v in row.items() if k} for row in csv.DictReader(stream)]
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=table) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot be read as CSV: {error}", where=table) from error


def _json(table: Path) -> list[Row]:
    try:
        content = read_json(table.read_bytes(), table)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=table) from error
    if isinstance(content, dict):
        return [{"file": file, "label": label} for file, label in content.items()]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise DataError("is no table", where=table, expected='[{"file", "label"}, ...] or {file: label}')
    return content


def _folders(root: Path) -> list[Row]:
    files = sorted(p for p in root.glob("*/**/*") if p.suffix.lower() in SUFFIXES)
    return [{"file": p.relative_to(root).as_posix(), "label": p.relative_to(root).parts[0]} for p in files]


def class_names(rows: Sequence[Row]) -> list[str]:
    """All labels in order: whole numbers as they are (0 .. largest), names alphabetically; nothing without labels.

    Raises:
        DataError: the largest number is no number of a class.
    """
    labels = {str(row["label"]) for row in rows if is_labelled(row)}
    if not labels:
        return []
    if not all(NUMBER.fullmatch(label) for label in labels):
        return sorted(labels)
    largest = max(labels, key=lambda label: (len(label), label))
    if len(largest) > len(str(MAX_CLASSES)) or int(largest) >= MAX_CLASSES:
        raise DataError("numbers as labels are those of classes, from 0", where="label", found=largest[:40],
                        expected=f"less than {MAX_CLASSES}", fix="Name the classes, or number them anew")
    return [str(number) for number in range(int(largest) + 1)]


def image_drives(
    root: Path, rows: Sequence[Row], *, size: tuple[int, int] | None, channels: int
) -> Iterator[Drive]:
    """One drive a sequence of the table (or an image), with `image` float32 (T, C, H, W) and `label` int64 (T,).

    The label is -1, unknown, where an image has none; there is no such array where no image has one.

    Raises:
        DataError: an image is missing or broken, frames of one sequence differ in size, split or metadata.
    """
    numbers = {name: number for number, name in enumerate(class_names(rows))}
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[str(row.get("sequence") or row["file"])].append(row)
    for name, members in groups.items():
        images = [_image(root, str(row["file"]), size, channels) for row in members]
        if len({image.shape for image in images}) > 1:
            raise DataError(f"images of {name} differ in size", where=root, fix="Give --height and --width")
        arrays = {"image": np.stack(images)}
        if numbers:
            arrays["label"] = np.array([numbers[str(row["label"])] if is_labelled(row) else UNKNOWN for row in members],
                                       np.int64)
        yield Drive(safe_id(name), arrays, _metadata(name, members), _split(name, members))


def _image(root: Path, file: str, size: tuple[int, int] | None, channels: int) -> Any:
    path = root / file
    require_inside(root, path)
    return decode_image(path.read_bytes(), size, channels, where=path)


def _metadata(name: str, members: Sequence[Row]) -> dict[str, Any]:
    found = {key: value for key, value in members[0].items() if key not in OWN and value not in (None, "")}
    for row in members:
        if changed := [key for key in found if row.get(key) != found[key]]:
            raise DataError(f"frames of {name} differ in {changed[0]!r}", where="metadata",
                            fix="Metadata belongs to a sequence: leave the column out, or split the sequence")
    return found


def _split(name: str, members: Sequence[Row]) -> str | None:
    said = {str(row.get("split") or "") for row in members}
    if len(said) > 1:
        raise DataError(f"frames of {name} stand in two splits", where="split", found=", ".join(sorted(said)))
    (split,) = said
    if split and split not in SPLITS:
        raise DataError(f"{name} stands in an unknown split", where="split", expected=", ".join(SPLITS), found=split)
    return split or None
