from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.importing import stage
from fmdeploy.data.importing.images import read_table
from fmdeploy.data.importing.pictures import decode_image
from fmdeploy.data.importing.stage import import_data
from fmdeploy.data.split import split
from fmdeploy.errors import ConfigError, DataError
from fmdeploy.tasks.image_classification import ImageClassification
from support.tarshards import npy, shard


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (20, 10), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def load(out: Path, **options: Any) -> Dataset:
    import_data(out=out, **options)
    return open_dataset(out)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six red cars, six green cones."""
    for k in range(6):
        picture(tmp_path / "data" / "car" / f"{k}.png", (200, k, 0))
        picture(tmp_path / "data" / "cone" / f"{k}.jpg", (0, 200, k))
    return tmp_path / "data"


def test_folders_are_classes_and_a_classifier_reads_them(folder: Path, tmp_path: Path) -> None:
    data = load(tmp_path / "out", source=folder, format="images", height=32, width=32)
    samples = ImageClassification().samples(data, "all")
    inputs, targets = samples.batch(np.arange(len(samples)))
    assert inputs["image"].shape == (12, 3, 32, 32)
    assert inputs["image"].dtype == np.float32
    red = inputs["image"][:, 0].mean(axis=(1, 2)) > 0.5
    assert (targets["label"] == np.where(red, 0, 1)).all()
    assert data.artifact.json("classes.json") == ["car", "cone"]


def test_a_table_says_labels_sequences_splits_and_metadata(folder: Path, tmp_path: Path) -> None:
    rows = ["file,label,sequence,split,weather"]
    rows += [f"car/{k}.png,3,drive {k // 3},{'train' if k < 3 else 'test'},rain" for k in range(6)]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    data = load(tmp_path / "out", source=folder, format="images", labels=tmp_path / "labels.csv", channels=1)
    assert [(s.id, s.frames, s.metadata["weather"]) for s in data.sequences] == [("drive-0", 3, "rain"), ("drive-1", 3, "rain")]
    assert {name: len(ids) for name, ids in data.splits.items()} == {"train": 1, "val": 0, "test": 1}
    arrays = data.arrays(data.sequences[0])
    assert arrays["image"].shape == (3, 1, 10, 20)
    assert arrays["label"].tolist() == [3, 3, 3]
    table = {f"car/{k}.png": "lorry" for k in range(6)}
    (tmp_path / "labels.json").write_text(json.dumps(table))
    assert len(load(tmp_path / "json", source=folder, format="images", labels=tmp_path / "labels.json").sequences) == 6


@pytest.mark.parametrize("inside", [True, False])
def test_a_table_is_parsed_once_and_part_of_the_digest_wherever_it_lies(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    parsed: list[Path | None] = []

    def spied(root: Path, table: Path | None) -> list[dict[str, Any]]:
        parsed.append(table)
        return read_table(root, table)

    monkeypatch.setattr(stage, "read_table", spied)
    table = (folder if inside else tmp_path) / "labels.json"
    digests = []
    for label in ("lorry", "tug"):
        table.write_text(json.dumps({f"car/{k}.png": label if k == 0 else "car" for k in range(6)}))
        digests.append(load(tmp_path / label, source=folder, format="images", labels=table).artifact.manifest.config["content"])
    assert parsed == [table, table]
    assert digests[0] != digests[1]


def test_a_source_that_puts_nothing_into_train_is_told_at_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A set to evaluate on comes in, but whoever expected to train on it need not find out three stages later."""
    (tmp_path / "labels.csv").write_text("file,label,split\n" + "".join(f"car/{k}.png,3,test\n" for k in range(6)))
    data = load(tmp_path / "out", source=folder, format="images", labels=tmp_path / "labels.csv")
    assert len(data.split("test")) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert "leave train and val empty: nothing can be trained on it; fmdeploy data split" in line


BAD_TABLES = {
    "no file": ("name,label\ncar/0.png,1", "row 2 has no file"),
    "twice": ("file,label\ncar/0.png,1\ncar/0.png,2", "names car/0.png twice"),
    "absent": ("file,label\ncar/77.png,1", "77.png: is not a regular file"),
    "outside": ("file,label\n../secret.png,1", "leads out of the folder"),
    "two splits": ("file,label,sequence,split\ncar/0.png,1,a,train\ncar/1.png,1,a,test", "stand in two splits"),
    "no split": ("file,label,split\ncar/0.png,1,moon", "unknown split"),
    "some splits": ("file,label,split\ncar/0.png,1,train\ncar/1.png,1,", "of some sequences"),
    "metadata": ("file,label,sequence,night\ncar/0.png,1,a,yes\ncar/1.png,1,a,no", "differ in 'night'"),
    "empty": ("file,label\n", "names no images"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables_are_told_and_nothing_is_written(folder: Path, tmp_path: Path, case: str) -> None:
    text, message = BAD_TABLES[case]
    (tmp_path / "labels.csv").write_text(text)
    picture(tmp_path / "secret.png", (1, 1, 1))
    with pytest.raises(DataError, match=message):
        import_data(source=folder, format="images", labels=tmp_path / "labels.csv", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["file\ncar/0.png\ncar/1.png", "file,label\ncar/0.png,\ncar/1.png,  "])
def test_a_table_without_labels_is_a_data_set_without_labels(folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "files.csv").write_text(text)
    data = load(tmp_path / "out", source=folder, format="images", labels=tmp_path / "files.csv", val=0, test=0.5)
    assert [list(data.arrays(sequence)) for sequence in data.sequences] == [["image"], ["image"]]
    assert not (data.artifact.root / "classes.json").exists()
    inputs, targets = ImageClassification().samples(data, "train").batch(np.arange(1))
    assert (list(inputs), list(targets)) == (["image"], [])
    logits, (accuracy, ece) = {"logits": np.zeros((1, 10), np.float32)}, ImageClassification().metrics()
    asking: list[Callable[..., Any]] = [accuracy.statistics, ece.statistics, ImageClassification().events()[0].statistics,
                                        ImageClassification().loss]
    for asked in asking:
        with pytest.raises(DataError, match="the samples have no target 'label' .found none.*an objective that needs none"):
            asked(logits, targets)


def test_images_without_labels_among_others_are_unknown_to_losses_and_metrics(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text("file,label,sequence\ncar/0.png,tug,a\ncar/1.png,,a\ncar/2.png,bus,a")
    data = load(tmp_path / "out", source=folder, format="images", labels=tmp_path / "t.csv", val=0, test=0)
    assert "1 of 3 images have no label; theirs is -1" in capsys.readouterr().err
    label = data.arrays(data.sequences[0])["label"]
    assert (label.tolist(), data.artifact.json("classes.json")) == ([1, -1, 0], ["bus", "tug"])
    right = np.eye(10, dtype=np.float32)[[1, 0, 0]]
    accuracy = ImageClassification().metrics()[0]
    assert accuracy.statistics({"logits": right}, {"label": label}).sum(axis=0).tolist() == [2, 2]


@pytest.mark.parametrize(("header", "place"), [
    ("latitude,longitude", "{},{}"), ("position", "{} {}"), ("position", '"{}, {}"'),
])
def test_places_of_a_table_divide_it_by_geography(folder: Path, tmp_path: Path, header: str, place: str) -> None:
    """Two images in each of three towns: cells are text, and a town stays together."""
    rows = [f"car/{k}.png,3,{place.format(48.0 + k // 2, 11.5 + 1e-4 * (k % 2))}" for k in range(6)]
    (tmp_path / "t.csv").write_text("\n".join([f"file,label,{header}", *rows]))
    data = load(tmp_path / "out", source=folder, format="images", labels=tmp_path / "t.csv", by="geography",
                tile_m=5000, val=0.33, test=0.33)
    assert {name: len(ids) for name, ids in data.splits.items()} == {"train": 2, "val": 2, "test": 2}
    for ids in data.splits.values():
        one, other = (int(name.split("-")[1]) for name in ids)
        assert one // 2 == other // 2
    moved = split(data=data.artifact.root, out=tmp_path / "moved", by="geography", tile_m=5000, seed=1,
                  val=0.33, test=0.33)
    assert {len(ids) for ids in open_dataset(moved.root).splits.values()} == {2}


def _fifo(path: Path) -> None:
    os.mkfifo(path)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: p.write_bytes(encoded(Image.effect_noise((64, 64), 90), "JPEG")[:400]), "cannot be read as an image"),
    "text": (lambda p: p.write_text("not an image"), "cannot be read as an image"),
    "empty": (lambda p: p.write_bytes(b""), "cannot be read as an image"),
    "bomb": (lambda p: p.write_bytes(encoded(Image.new("1", (30000, 30000)))), "too large an image|cannot be read"),
    "fifo": (_fifo, "is not a regular file"),
    "link": (lambda p: p.symlink_to("/etc/hostname"), "leads out of the folder"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_images_are_told_by_name(folder: Path, tmp_path: Path, case: str) -> None:
    make, message = BROKEN[case]
    make(folder / "car" / "zz.png")
    with pytest.raises(DataError, match=f"zz.png: .*({message})"):
        import_data(source=folder, format="images", height=8, width=8, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_of_different_sizes_need_one(folder: Path, tmp_path: Path) -> None:
    picture(folder / "car" / "big.png", (9, 9, 9), size=(40, 40))
    (tmp_path / "l.csv").write_text("file,label,sequence\ncar/0.png,1,a\ncar/big.png,1,a")
    with pytest.raises(DataError, match="differ in size.*--height and --width"):
        import_data(source=folder, format="images", labels=tmp_path / "l.csv", out=tmp_path / "out")


def test_pictures_are_upright_deep_and_grey_as_they_should_be() -> None:
    wide = Image.new("RGB", (8, 4))
    wide.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    turned = decode_image(encoded(wide, exif=exif), None, 3, where="x")
    assert turned.shape == (3, 8, 4)
    assert turned[0, 0, -1] == 1.0
    deep = Image.fromarray(np.full((4, 4), 40000, np.uint16))
    assert decode_image(encoded(deep), None, 1, where="x").mean() == pytest.approx(40000 / 65535)
    assert decode_image(encoded(deep), (2, 2), 3, where="x").shape == (3, 2, 2)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert decode_image(encoded(clear), None, 3, where="x")[0].mean() == 1.0


def numbered(path: Path, samples: list[dict[str, bytes]]) -> Path:
    return shard(path, {f"{number:04d}.{key}": content for number, members in enumerate(samples)
                        for key, content in members.items()})


def test_webdataset_shards_come_in(tmp_path: Path) -> None:
    for part in range(2):
        numbered(tmp_path / "in" / f"{part}.tar", [
            {"png": encoded(Image.new("RGB", (6, 4), (10 * k, 0, 0))), "cls": str(k % 3).encode(),
             "lidar.npy": npy(np.full((2, 3), k, np.float32)),
             "json": json.dumps({"sequence": f"drive{part}-{k // 4}", "weather": "fog"}).encode()} for k in range(8)])
    data = load(tmp_path / "out", source=tmp_path / "in", format="webdataset", val=0, test=0.25)
    assert [(s.id, s.frames, s.metadata["weather"]) for s in data.sequences] == [
        (f"drive{part}-{half}", 4, "fog") for part in range(2) for half in range(2)]
    arrays = data.arrays(data.sequences[1])
    assert arrays["label"].tolist() == [1, 2, 0, 1]
    assert arrays["lidar"][:, 0, 0].tolist() == [4, 5, 6, 7]
    assert arrays["image"].shape == (4, 3, 4, 6)


BAD_SHARDS: dict[str, tuple[list[dict[str, bytes]], str]] = {
    "pickled": ([{"npy": npy(np.array([{}], object)), "cls": b"1"}], "cannot be read as an array"),
    "no class": ([{"cls": b"cat"}], "is no whole number"),
    "nothing": ([{"json": b"{}"}], "holds no array, image or class"),
    "no json": ([{"cls": b"1", "json": b"{"}], "is not JSON"),
    "shapes": ([{"npy": npy(np.zeros(k + 1)), "json": b'{"sequence": "a"}'} for k in range(2)], "other arrays than its first"),
    "split": ([{"cls": b"1", "json": b'{"split": "moon"}'}], "unknown split"),
    "image": ([{"jpg": b"xx"}], "cannot be read as an image"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shards_are_told_by_sample(tmp_path: Path, case: str) -> None:
    samples, message = BAD_SHARDS[case]
    path = numbered(tmp_path / "in.tar", samples)
    with pytest.raises(DataError, match=message):
        import_data(source=path, format="webdataset", out=tmp_path / "out", val=0, test=0)
    assert not (tmp_path / "out").exists()


def test_torn_shards_are_told(tmp_path: Path) -> None:
    path = numbered(tmp_path / "in" / "0.tar", [{"cls": b"1", "npy": npy(np.zeros(4000))}])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="0.tar: cannot be read as a WebDataset shard"):
        import_data(source=path, format="webdataset", out=tmp_path / "out")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no tar shards"):
        import_data(source=tmp_path / "none", format="webdataset", out=tmp_path / "out")


def test_options_that_do_not_fit_the_format(tmp_path: Path) -> None:
    for options, message in (({"format": "mcap"}, "at least one --topic"), ({"format": "images", "height": 3}, "both height"),
                             ({"format": "webdataset", "labels": tmp_path}, "labels is an option of --format images"),
                             ({"format": "images", "rate_hz": 2.0}, "rate_hz is an option of --format mcap"),
                             ({"format": "mcap", "topic": ("a=/b:c",), "points": False}, "points is an option of --format nusc")):
        with pytest.raises(ConfigError, match=message):
            import_data(source=tmp_path, out=tmp_path / "out", **options)
    with pytest.raises(DataError, match="does not exist"):
        import_data(source=tmp_path / "x", out=tmp_path / "out", format="images")
