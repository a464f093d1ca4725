"""A DATASET whose index was written by somebody else says in one line what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fmdeploy.config import StageConfig
from fmdeploy.data.format import open_unchecked
from fmdeploy.draft import produce
from fmdeploy.errors import DataError
from fmdeploy.manifest import Kind

GOOD = {"id": "a", "shard": "shards/0.tar", "frames": 3, "metadata": {}}


class _Plain(StageConfig):
    """No options."""


def write(out: Path, index: Any, splits: Any) -> None:
    def build(draft: Any) -> None:
        draft.write_json("index.json", index)
        draft.write_json("splits.json", splits)

    produce(out, Kind.DATASET, stage="data forged", config=_Plain(), inputs={}, build=build)


def test_a_sound_index_opens(tmp_path: Path) -> None:
    write(tmp_path / "d", [GOOD], {"train": ["a"]})
    assert open_unchecked(tmp_path / "d").splits == {"train": ("a",)}


@pytest.mark.parametrize(("index", "splits"), [
    ([{**GOOD, "more": 1}], {}), ([{"id": "a"}], {}), ([1], {}), (3, {}), ([GOOD], ["train"]), ([GOOD], {"train": 1}),
    ([{**GOOD, "frames": "3"}], {}), ([{**GOOD, "frames": -1}], {}), ([{**GOOD, "metadata": None}], {}),
    ([{**GOOD, "id": ["a"]}], {}),
])
def test_an_index_of_another_form_is_refused_in_one_line(tmp_path: Path, index: Any, splits: Any) -> None:
    write(tmp_path / "d", index, splits)
    with pytest.raises(DataError, match="another form|no sequence") as caught:
        open_unchecked(tmp_path / "d")
    assert "\n" not in str(caught.value)
