"""The disk fills up at the first byte, in a shard, and next to the end: one line, exit code 3, nothing half-written."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from mcap.writer import Writer
from PIL import Image

from fmdeploy.artifact import open_artifact
from fmdeploy.cli import main
from support.nuscenes_tables import write_nuscenes
from support.tarshards import shard

DISK = 2**21
COUNT = 24  # pictures of noise, which no archive makes smaller


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    root = tmp_path / "disk"
    root.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", root], capture_output=True).returncode:
        pytest.skip("cannot mount a small tmpfs here (needs root)")
    yield root
    subprocess.run(["umount", root], check=True)


def _pictures() -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    for _ in range(COUNT):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)).save(stream, "PNG")
        yield stream.getvalue()


def _folder(root: Path) -> list[str]:
    for number, content in enumerate(_pictures()):
        path = root / ("car", "cone")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return [str(root), "--format", "images"]


def _webdataset(root: Path) -> list[str]:
    members = {f"{number:03d}.png": content for number, content in enumerate(_pictures())}
    labels = {name.replace(".png", ".cls"): b"1" for name in members}
    shard(root / "a-000000.tar", dict(sorted({**members, **labels}.items())))
    return [str(root), "--format", "webdataset"]


def _mcap(root: Path) -> list[str]:
    root.mkdir()
    rng, second = np.random.default_rng(0), 10**9
    with (root / "a.mcap").open("wb") as stream:
        writer = Writer(stream)
        writer.start()
        channel = writer.register_channel("/scan", "json", writer.register_schema("/scan", "jsonschema", b"{}"))
        for number in range(60):
            content = json.dumps({"ranges": rng.random(1000).tolist()}).encode()
            writer.add_message(channel, number * second // 5, content, number * second // 5)
        writer.finish()  # type: ignore[no-untyped-call]
    return [str(root), "--format", "mcap", "--topic", "scan=/scan:ranges", "--drive-s", "3"]


def _nuscenes(root: Path) -> list[str]:
    return [str(write_nuscenes(root, samples=30)), "--format", "nuscenes"]


def _run(*command: str) -> object:
    """Exit code of the command."""
    with pytest.raises(SystemExit) as stop:
        main(["data", "import", *command])
    return stop.value.code


@pytest.mark.parametrize("source", [_nuscenes, _folder, _webdataset, _mcap])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    source: Callable[[Path], list[str]], disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*source(tmp_path / "source"), "--val", "0", "--test", "0"]
    assert _run(*command, "--out", str(tmp_path / "whole")) == 0
    whole = open_artifact(tmp_path / "whole")
    size = sum(entry.size for entry in whole.manifest.files.values())
    assert 2**15 < size < DISK, "too small to be cut, or too large for the disk"
    capsys.readouterr()
    for share in (0.0, 0.4, 0.97):
        (disk / "full").write_bytes(bytes(DISK - int(share * size) // 4096 * 4096))
        assert _run(*command, "--out", str(disk / "out")) == 3
        said = capsys.readouterr().err.splitlines()
        assert [line for line in said if "fmdeploy data split" not in line] == [
            f"fmdeploy: {disk}: the disk is full; nothing that opens was left behind. "
            "Free some space and run the same command again"]
        assert [path.name for path in disk.iterdir()] == ["full"]
        (disk / "full").unlink()
    assert _run(*command, "--out", str(disk / "out")) == 0
    assert open_artifact(disk / "out").digest == whole.digest
