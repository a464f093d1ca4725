"""Checkpoints that somebody else wrote (M25), where `teacher import` reads them: refused in one line, never run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fmdeploy import cli
from fmdeploy.errors import ModelFileError
from fmdeploy.teacher.importing.checkpoint import read_checkpoint
from fmdeploy.teacher.importing.child import Refused, convert
from support.fdti import Fdti

LIMIT = 8 * 2**20


class Payload:
    """Unpickling it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def saved(value: Any) -> bytes:
    packed = io.BytesIO()
    torch.save(value, packed)
    return packed.getvalue()


def with_entry(raw: bytes, name: str, content: bytes, *, compress: bool = False) -> bytes:
    """A checkpoint whose archive got one more file."""
    packed = io.BytesIO(raw)
    with zipfile.ZipFile(packed, "a", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        archive.writestr(name, content)
    return packed.getvalue()


def zip_of(entries: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return packed.getvalue()


def tar_of(raw: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        info = tarfile.TarInfo("storages")
        info.size = len(raw)
        archive.addfile(info, io.BytesIO(raw))
    return packed.getvalue()


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"w": torch.zeros(1)}
    for _ in range(depth):
        value = {"a": value}
    return value


def weights() -> dict[str, torch.Tensor]:
    return {"w": torch.arange(4.0)}


CASES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "pickle": (lambda m: pickle.dumps(Payload(m)), "holds code|holds more than weights: Unsupported operand"),
    "old pickle": (lambda m: pickle.dumps(Payload(m), protocol=2), "holds code: reading it would call"),
    "torch.save": (lambda m: saved({"w": torch.zeros(1), "x": Payload(m)}), r"holds code: reading it would call (posix|os)\.system"),
    "zip": (lambda m: zip_of({"a/data.pkl": pickle.dumps(Payload(m)), "a/version": b"3\n"}), "holds code|holds more than weights: Unsupported operand"),
    "TorchScript": (lambda m: with_entry(saved(weights()), "archive/code/__torch__.py", f"import os\nos.system('touch {m}')".encode()), "TorchScript"),
    "legacy tar": (lambda m: tar_of(pickle.dumps(Payload(m))), "a tar archive"),
    "7z": (lambda m: b"7z\xbc\xaf\x27\x1c" + pickle.dumps(Payload(m)), "a 7z archive"),
    "whole module": (lambda m: saved(torch.nn.Linear(2, 2)), "holds code: reading it would call torch.nn"),
    "cut short": (lambda m: saved(weights())[:200], "damaged|zip archive|no readable archive"),
    "cut in the middle": (lambda m: saved({"w": torch.zeros(4000)})[:-3000], "damaged|no readable archive"),
    "empty": (lambda m: b"", "it is empty"),
    "zeros": (lambda m: b"\0" * 1000, "nothing but zeros"),
    "web page": (lambda m: b"<!doctype html><p>404", "a web page"),
    "LFS pointer": (lambda m: b"version https://git-lfs.github.com/spec/v1\n", "git-LFS"),
    "any zip": (lambda m: zip_of({"readme.txt": b"hello"}), "not one of torch.save"),
    "zip bomb": (lambda m: with_entry(saved(weights()), "archive/data/9", bytes(50 * 2**20), compress=True), "compressed"),
    "two of one name": (lambda m: with_entry(saved(weights()), "archive/version", b"3"), "two files of one name"),
    "stride of zero": (lambda m: saved({"w": torch.zeros(1).expand(10**9)}), "its tensors hold 4000000000 bytes"),
    "no tensors": (lambda m: saved({"epoch": 3}), "holds no tensors"),
    "deep": (lambda m: saved(nested(40)), "nested deeper"),
    "sparse": (lambda m: saved({"w": torch.zeros(3, 3).to_sparse()}), "holds no tensors|damaged|more than weights"),
    "too large": (lambda m: saved({"w": torch.zeros(3 * 2**20)}), "is too large"),
    "text": (lambda m: b"hello world " * 50, "damaged|more than weights|no torch checkpoint"),
    "memo bomb": (lambda m: b"\x80\x02" + b"r" + struct.pack("<I", 2**31) + b".", "damaged|more than weights|more memory|within the limits"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_M25_import_refuses(case: str, tmp_path: Path, fdti: Fdti) -> None:
    """The checks of the child process, here without its process: the same function, one process start fewer."""
    make, message = CASES[case]
    marker, file = tmp_path / "executed", tmp_path / "weights.pt"
    file.write_bytes(make(marker))
    whole = case in ("torch.save", "zip bomb", "memo bomb")  # these go through the child and its limits
    alone = case in ("7z", "legacy tar", "empty", "zeros", "web page", "LFS pointer", "too large")  # no child is started
    def read() -> None:
        if whole or alone:
            read_checkpoint(file, max_bytes=LIMIT, seconds=120)
        else:
            convert(file, tmp_path / "out.safetensors", LIMIT)

    with fdti.detecting(case), pytest.raises((ModelFileError, Refused), match=message) as caught:
        read()
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value), "it advises to switch the protection off"
    assert not marker.exists(), "a checkpoint was executed"


def test_M25_import_on_the_command_line(tmp_path: Path, fdti: Fdti, capsys: pytest.CaptureFixture[str]) -> None:
    marker, file = tmp_path / "executed", tmp_path / "weights.pth"
    file.write_bytes(saved({"state_dict": Payload(marker)}))
    with fdti.detecting("teacher import"), pytest.raises(SystemExit) as stop:
        cli.main(["teacher", "import", str(file), "--out", str(tmp_path / "t")])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    assert "holds code: reading it would call" in said
    assert not marker.exists()
    assert not (tmp_path / "t").exists()


def test_M25_import_does_not_wait_for_a_fifo(tmp_path: Path, fdti: Fdti) -> None:
    os.mkfifo(tmp_path / "weights.pt")
    with fdti.detecting("FIFO"), pytest.raises(ModelFileError, match="not a regular file"):
        read_checkpoint(tmp_path / "weights.pt", max_bytes=LIMIT, seconds=120)


def test_M25_import_ends_what_takes_too_long(tmp_path: Path, fdti: Fdti) -> None:
    (tmp_path / "weights.pt").write_bytes(saved(weights()))
    with fdti.detecting("time limit"), pytest.raises(ModelFileError, match="takes too long to read"):
        read_checkpoint(tmp_path / "weights.pt", max_bytes=LIMIT, seconds=0.05)


def test_M25_control_a_checkpoint_of_weights_is_read(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(saved({"state_dict": weights(), "epoch": 3}))
    tensors, counts = read_checkpoint(tmp_path / "weights.pt", max_bytes=LIMIT, seconds=120)
    assert torch.equal(tensors["state_dict.w"], weights()["w"])
    assert counts == {"tensors": 1, "others": 1}


def test_M25_control_the_payload_runs_where_nobody_protects(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (tmp_path / "weights.pt").write_bytes(saved({"x": Payload(marker)}))
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert marker.exists(), "the marker proves nothing"
