"""What strangers send: one line that says what is wrong, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fmdeploy.data.importing.drives import safe_id
from fmdeploy.data.importing.images import class_names
from fmdeploy.data.importing.mcap import parse_topics
from fmdeploy.data.importing.nuscenes_tables import FIELDS, read_tables
from fmdeploy.data.importing.stage import import_data
from fmdeploy.errors import ConfigError, DataError
from support.nuscenes_tables import write_nuscenes
from support.tarshards import npy, shard


@pytest.mark.parametrize(("table", "key"), [(table, key) for table, fields in FIELDS.items() for key in fields])
def test_a_nuscenes_record_without_what_is_read_is_named(source: Path, table: str, key: str) -> None:
    path = source / "v1.0-mini" / f"{table}.json"
    before = path.read_text()
    rows = json.loads(before)
    try:
        for broken in ({k: v for k, v in rows[0].items() if k != key}, {**rows[0], key: {"a": 1}}):
            path.write_text(json.dumps([broken, *rows[1:]]))
            with pytest.raises(DataError, match=rf"{table}.json: the record {rows[0]['token']} has no usable '{key}'"):
                read_tables(source)
    finally:
        path.write_text(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nuscenes(tmp_path_factory.mktemp("nuscenes"), samples=2, points=False)


@pytest.mark.parametrize(("members", "why"), [
    ({"0.cls": b"9" * 40}, "is no whole number"),
    ({"0.npz": b"PK\x03\x04abc"}, "cannot be read as an array: File is not a zip file"),
    ({"0.npz": npy(np.ones(3))}, "cannot be read as an array"),
    ({"0.cls": b"1", "0.json": b'{"x": NaN}'}, "is not JSON: NaN"),
    ({"0.cls": b"1", "0.json": b"[" * 100_000}, "is not JSON"),
    ({"0.cls": b"1", "0.json": b'{"recording": "a", "first_frame": "x"}',
      "1.cls": b"1", "1.json": b'{"recording": "a"}'}, "first_frame is no whole number"),
    ({"0.cls": b"1", "0.json": b'{"sequence": "s", "split": "train"}',
      "1.cls": b"1", "1.json": b'{"sequence": "s", "split": "test"}'}, "frames of s stand in two splits"),
    ({f"{k}.{kind}": content for k, name in enumerate("aba")
      for kind, content in (("cls", b"1"), ("json", json.dumps({"sequence": name}).encode()))}, "would be called a"),
])
def test_a_broken_shard_is_one_line(tmp_path: Path, members: dict[str, bytes], why: str) -> None:
    with pytest.raises(DataError, match=why):
        import_data(source=shard(tmp_path / "a.tar", members), format="webdataset", out=tmp_path / "out", val=0, test=0.4)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_what_samples_of_a_sequence_say_differently_is_not_its_metadata(tmp_path: Path) -> None:
    about = [{"sequence": "s", "place": "apron", "time": k, "seed": {"a": [1]}} for k in range(3)]
    members = {f"{k}.{kind}": content for k, said in enumerate(about)
               for kind, content in (("cls", b"1"), ("json", json.dumps(said).encode()))}
    made = import_data(source=shard(tmp_path / "a.tar", members), format="webdataset", out=tmp_path / "out", val=0, test=0)
    (sequence,) = made.json("index.json")
    assert sequence["metadata"] == {"place": "apron", "seed": {"a": [1]}, "simulation": "s"}


@pytest.mark.parametrize("row", [{"file": ["a.png"], "label": 1}, {"file": "a.png", "label": {"a": 1}}])
def test_a_table_of_something_else_is_one_line(tmp_path: Path, row: dict[str, Any]) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "t.json").write_text(json.dumps([row]))
    with pytest.raises(DataError, match="row 2: the file is no text, or the label neither"):
        import_data(source=tmp_path, format="images", labels=tmp_path / "t.json", out=tmp_path / "out")


def test_names_in_any_script_stay_apart_and_fit_into_a_tar(tmp_path: Path) -> None:
    for name in ("車/一", "車/二", "x" * 180):
        path = tmp_path / "data" / "a" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    made = import_data(source=tmp_path / "data", format="images", out=tmp_path / "out", val=0, test=0)
    assert len({row["id"] for row in made.json("index.json")}) == 3
    assert safe_id("car/0.png") == "car-0-png"
    assert safe_id("a?b") != safe_id("a:b")


def test_labels_that_are_no_class_numbers_are_refused() -> None:
    assert class_names([{"label": "2"}, {"label": 0}]) == ["0", "1", "2"]
    assert class_names([{"label": "²"}, {"label": "007"}]) == ["007", "²"]
    with pytest.raises(DataError, match="less than 100000"):
        class_names([{"label": 999_999_999}, {"label": 0}])


def test_two_topics_cannot_be_one_array() -> None:
    with pytest.raises(ConfigError, match="names an array twice"):
        parse_topics(["a=/x:y", "a=/x:z"])
    with pytest.raises(ConfigError, match="names an array twice.*time_ns"):
        parse_topics(["time_ns=/x:y"])
