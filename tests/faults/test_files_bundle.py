"""Bad files in a bundle, and bad manifests (faults.md 5.1, 5.4): one line that names the likely cause, never a hang."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.artifact import open_artifact
from fmdeploy.errors import ArtifactError, ConfigError, FmdeployError
from fmdeploy.manifest import MAX_MANIFEST_BYTES
from fmdeploy.runtime.bundle import open_bundle
from support.badfiles import bundle_with, refused_by_runtime, resealed
from support.bundles import fp32_model
from support.fdti import Fdti
from support.processes import FMDEPLOY
from support.runtimes import toy_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the toy bundle to break."""
    return Path(shutil.copytree(toy_bundle(), tmp_path / "bundle"))


def refuse(root: Path, message: str, fdti: Fdti, detail: str = "", kind: type[FmdeployError] = ArtifactError) -> None:
    with fdti.detecting(detail), pytest.raises(kind, match=message) as caught:
        open_bundle(root)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def zipped(raw: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("model.onnx", raw)
    return packed.getvalue()


NOT_MODELS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("M1", b"", "it is empty"),
    "one byte less": ("M2", fp32_model()[:-1], "not all of it"),
    "half": ("M2", fp32_model()[: len(fp32_model()) // 2], "not all of it"),
    "random": ("M3", np.random.default_rng(0).bytes(5000), "is not an ONNX model"),
    "gzip": ("M3", gzip.compress(fp32_model()), "gzip-compressed"),
    "zip": ("M3", zipped(fp32_model()), "a zip archive"),
    "HTML": ("M3", b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>", "a web page"),
    "git-LFS": ("M3", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
    "zeros": ("M3", bytes(4096), "nothing but zeros"),
    "pickle": ("M3", b"\x80\x04\x95\x00", "a Python pickle"),
}


def _not_a_model(row: str, case: str, bundle: Path, tmp_path: Path, fdti: Fdti) -> None:
    """In a bundle that was sealed around it, and in one where it took the model's place on the way."""
    _, raw, message = NOT_MODELS[case]
    start = time.perf_counter()
    said = refused_by_runtime(tmp_path / "sealed", raw)
    assert message in said
    assert "model.fp32.onnx" in said
    (bundle / "model.fp32.onnx").write_bytes(raw)
    refuse(bundle, "another size", fdti)
    assert row in ("M1", "M2", "M3")
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize("case", [k for k, v in NOT_MODELS.items() if v[0] == "M1"])
def test_M1_empty_file(case: str, bundle: Path, tmp_path: Path, fdti: Fdti) -> None:
    _not_a_model("M1", case, bundle, tmp_path, fdti)


@pytest.mark.parametrize("case", [k for k, v in NOT_MODELS.items() if v[0] == "M2"])
def test_M2_truncated_file(case: str, bundle: Path, tmp_path: Path, fdti: Fdti) -> None:
    _not_a_model("M2", case, bundle, tmp_path, fdti)


@pytest.mark.parametrize("case", [k for k, v in NOT_MODELS.items() if v[0] == "M3"])
def test_M3_something_else_in_its_place(case: str, bundle: Path, tmp_path: Path, fdti: Fdti) -> None:
    _not_a_model("M3", case, bundle, tmp_path, fdti)


def test_M3_the_manifest_itself_and_the_bundle_itself(bundle: Path, tmp_path: Path, fdti: Fdti) -> None:
    for case, raw, message in [(k, v[1], v[2]) for k, v in NOT_MODELS.items() if v[0] == "M3" and k != "random"]:
        (bundle / "manifest.json").write_bytes(raw)
        refuse(bundle, message, fdti, f"{case} as manifest")
        (tmp_path / "file").write_bytes(raw)
        refuse(tmp_path / "file", message, fdti, f"{case} as bundle")


def test_M4_directory_missing_and_no_permission(bundle: Path, tmp_path: Path, fdti: Fdti) -> None:
    model = bundle / "model.fp32.onnx"
    raw = model.read_bytes()
    model.unlink()
    refuse(bundle, r"lacks the file model\.fp32\.onnx", fdti, "missing")
    model.mkdir()
    refuse(bundle, r"lacks the file model\.fp32\.onnx", fdti, "an empty directory")
    (model / "inside").write_bytes(b"")
    refuse(bundle, r"lacks the file model\.fp32\.onnx", fdti, "a directory")
    refuse(tmp_path / "nothing", "no such artifact", fdti, "no bundle")
    refuse(tmp_path, r"it has no manifest\.json", fdti, "no manifest")
    shutil.rmtree(model)
    model.write_bytes(raw)
    model.chmod(0)
    code = f"""
import os
from fmdeploy.runtime.bundle import open_bundle
os.getuid() == 0 and os.setresuid(65534, 65534, 65534)
open_bundle({str(bundle)!r})
"""
    parents = [p for p in (bundle, *bundle.parents) if p.stat().st_uid == os.getuid()]
    before = [(p, p.stat().st_mode) for p in parents]
    for path in parents:
        path.chmod(path.stat().st_mode | 0o755)
    try:
        with fdti.detecting("no permission, in a process of its own"):
            done = subprocess.run([FMDEPLOY[0], "-c", code], capture_output=True, text=True)
    finally:
        for path, mode in before:
            path.chmod(mode)
    assert "ArtifactError" in done.stderr
    assert "Permission denied" in done.stderr


@pytest.mark.timeout(60)
def test_M5_fifo_device_and_socket(bundle: Path, fdti: Fdti) -> None:
    model = bundle / "model.fp32.onnx"
    model.unlink()
    os.mkfifo(model)
    refuse(bundle, "is not a regular file", fdti, "FIFO")
    done = subprocess.run([*FMDEPLOY, "verify", str(bundle), "--key", str(model)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2, done.stderr
    assert "is not a regular file" in done.stderr
    model.unlink()
    model.symlink_to("/dev/zero")
    refuse(bundle, "behind a link", fdti, "/dev/zero")
    model.unlink()
    here = Path.cwd()
    os.chdir(bundle)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("model.fp32.onnx")
            refuse(bundle, "is not a regular file", fdti, "socket")
    finally:
        os.chdir(here)


@pytest.mark.skipif(os.getuid() != 0, reason="only root makes device nodes")
@pytest.mark.timeout(60)
def test_M5_device_node(bundle: Path, fdti: Fdti) -> None:
    model = bundle / "model.fp32.onnx"
    model.unlink()
    try:
        os.mknod(model, 0o600 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("no device nodes in this container")
    refuse(bundle, "is not a regular file", fdti, "/dev/zero by another name")


def test_M5_folder_behind_an_open_bundle_and_in_place_of_the_signature(bundle: Path, fdti: Fdti) -> None:
    opened = open_bundle(bundle)
    (bundle / "model.fp32.onnx").rename(bundle.parent / "aside")
    (bundle / "model.fp32.onnx").mkdir()
    with fdti.detecting("after opening"), pytest.raises(ArtifactError, match="not a regular file"):
        opened.model_bytes("fp32")
    (bundle / "model.fp32.onnx").rmdir()
    (bundle.parent / "aside").rename(bundle / "model.fp32.onnx")
    (bundle / "model.sig").mkdir()
    (bundle / "model.sig" / "x").write_bytes(b"1")
    resealed(bundle, lambda body: body["files"].update({"model.sig/x": {"sha256": hashlib.sha256(b"1").hexdigest(), "size": 1}}))
    refuse(bundle, "not a regular file", fdti, "as signature")


def test_M5_folders_without_end(bundle: Path, fdti: Fdti) -> None:
    at = os.open(bundle, os.O_RDONLY)
    for _ in range(1500):  # deeper than a path can name, and than Python can recurse
        os.mkdir("a", dir_fd=at)
        inner = os.open("a", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    os.close(at)
    refuse(bundle, "nested too deep", fdti)
    subprocess.run(["rm", "-rf", bundle / "a"], check=True)
    assert open_bundle(bundle), "control"


@pytest.mark.timeout(60)
def test_M5_fifo_as_manifest_and_behind_an_open_bundle(bundle: Path, fdti: Fdti) -> None:
    opened = open_bundle(bundle)
    for name in ("io.json", "model.fp32.onnx", "manifest.json"):
        (bundle / name).unlink()
        os.mkfifo(bundle / name)
    with fdti.detecting("after opening"), pytest.raises(ArtifactError, match="not a regular file"):
        opened.model_bytes("fp32")
    refuse(bundle, r"no manifest\.json", fdti, "as manifest")


def test_M5_hard_link_and_linked_folder(bundle: Path, tmp_path: Path, fdti: Fdti) -> None:
    os.link(bundle / "model.fp32.onnx", tmp_path / "second-name")
    refuse(bundle, "is a hard link", fdti)
    deep = bundle_with(tmp_path / "deep", {"sub/extra.bin": b"1234"})
    shutil.move(deep / "sub", tmp_path / "moved")
    (deep / "sub").symlink_to(tmp_path / "moved")
    refuse(deep, r"lacks the file sub/extra\.bin", fdti, "its folder is a link")


@pytest.mark.timeout(60)
def test_M6_sparse_file_of_10_GB(bundle: Path, fdti: Fdti) -> None:
    os.truncate(bundle / "model.fp32.onnx", 10 * 2**30)
    start = time.perf_counter()
    refuse(bundle, r"another size .*found 10737418240", fdti, "another size than in the manifest")
    resealed(bundle, lambda body: body["files"]["model.fp32.onnx"].update(size=10 * 2**30))
    refuse(bundle, "more than a device takes", fdti, "a manifest that agrees")
    resealed(bundle, lambda body: body["files"]["model.fp32.onnx"].update(size=1))
    os.truncate(bundle / "manifest.json", 10 * 2**30)
    refuse(bundle, "too large", fdti, "as manifest")
    assert time.perf_counter() - start < 10, "nothing of it may be read"


def test_M6_too_many_files(bundle: Path, fdti: Fdti) -> None:
    entry = {"sha256": "0" * 64, "size": 1}
    resealed(bundle, lambda body: body["files"].update({f"f{k}": entry for k in range(1001)}))
    refuse(bundle, "more than a device takes", fdti)


# M22: manifests. Each is sealed where that is possible, so that the seal cannot be what refuses it.

SEALED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing key": (lambda m: m.pop("files"), "'files': field required"),
    "unknown key": (lambda m: m.update(extra=1), "'extra'"),
    "kind is a number": (lambda m: m.update(kind=5), "'kind'"),
    "unknown kind": (lambda m: m.update(kind="ROCKET"), "'kind'"),
    "stage is a list": (lambda m: m.update(stage=[]), "'stage'"),
    "stage with a line break": (lambda m: m.update(stage="a\nb"), "'stage'"),
    "size is text": (lambda m: m["files"]["io.json"].update(size="12"), "'files.io.json.size'"),
    "size is true": (lambda m: m["files"]["io.json"].update(size=True), "'files.io.json.size'"),
    "size is 1.0": (lambda m: m["files"]["io.json"].update(size=1.0), "'files.io.json.size'"),
    "size is negative": (lambda m: m["files"]["io.json"].update(size=-1), "'files.io.json.size'"),
    "size is huge": (lambda m: m["files"]["io.json"].update(size=10**30), "'files.io.json.size'|more than a device"),
    "hash is short": (lambda m: m["files"]["io.json"].update(sha256="ab"), "sha256"),
    "hash with a line break": (lambda m: m["files"]["io.json"].update(sha256="0" * 64 + "\n"), "sha256"),
    "files is a list": (lambda m: m.update(files=[]), "'files'"),
    "no such version": (lambda m: m.update(schema_version=2), "another schema version .*expected 1, found 2"),
    "version is true": (lambda m: m.update(schema_version=True), "'schema_version'"),
    "version is text": (lambda m: m.update(schema_version="1"), "another schema version"),
    "version is missing": (lambda m: m.pop("schema_version"), "another schema version"),
    "name leaves": (lambda m: m["files"].update({"../x": m["files"].pop("io.json")}), "leaves the artifact"),
    "absolute name": (lambda m: m["files"].update({"/etc/passwd": m["files"].pop("io.json")}), "leaves the artifact"),
    "empty name": (lambda m: m["files"].update({"": m["files"].pop("io.json")}), "leaves the artifact"),
    "name with NUL": (lambda m: m["files"].update({"a\0b": m["files"].pop("io.json")}), "not a name"),
    "name with escape codes": (lambda m: m["files"].update({"\x1b[2J": m["files"].pop("io.json")}), "not a name"),
    "name that is too long": (lambda m: m["files"].update({"a" * 300: m["files"].pop("io.json")}), "not a name"),
    "the manifest lists itself": (lambda m: m["files"].update({"manifest.json": m["files"]["io.json"]}), "leaves"),
    "the manifest lists the signature": (lambda m: m["files"].update({"model.sig": m["files"]["io.json"]}), "leaves"),
    "deep nesting": (lambda m: m.update(config=_nested(200)), "nested deeper"),
}
RAW: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "duplicate key": (lambda raw: raw.replace(b'"stage"', b'"kind": "BUNDLE", "stage"', 1), "duplicate key"),
    "NaN": (lambda raw: raw.replace(b'"seconds": ', b'"seconds": NaN, "s": ', 1), "NaN is not JSON"),
    "Infinity": (lambda raw: raw.replace(b'"seconds": ', b'"seconds": -Infinity, "s": ', 1), "Infinity is not JSON"),
    "1e999": (lambda raw: raw.replace(b'"seconds": ', b'"seconds": 1e999, "s": ', 1), "1e999 is not a finite number"),
    "BOM": (lambda raw: b"\xef\xbb\xbf" + raw, "byte order mark"),
    "UTF-16": (lambda raw: raw.decode().encode("utf-16"), "strict JSON"),
    "CRLF": (lambda raw: raw.replace(b"\n", b"\r\n"), "CR LF"),
    "comment": (lambda raw: b"// hello\n" + raw, "strict JSON"),
    "trailing comma": (lambda raw: raw.rstrip()[:-1] + b",}", "strict JSON"),
    "two documents": (lambda raw: raw + raw, "strict JSON"),
    "cut": (lambda raw: raw[:-20], "strict JSON"),
    "nested for ever": (lambda raw: b"[" * 10**6, "nested too deep"),
    "nested objects": (lambda raw: b'{"a":' * 10**5, "nested too deep"),
    "number of a million digits": (lambda raw: raw.replace(b'"seconds": ', b'"seconds": ' + b"9" * 10**6 + b', "s": ', 1),
                                   "strict JSON|does not match its seal"),
    "lone surrogate": (lambda raw: raw.replace(b'"stage": "', b'"stage": "\\ud800', 1), "not valid|seal"),
    "100 MB": (lambda raw: raw + b" " * (100 * 10**6), "too large"),
    "seal is missing": (lambda raw: raw.replace(b'"seal"', b'"deal"'), "not valid at 'deal'"),
    "other seal": (lambda raw: raw.replace(b'"stage": "export"', b'"stage": "Export"'), "does not match its seal"),
}


def _nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize("case", SEALED)
def test_M22_sealed_manifest_that_breaks_a_rule(case: str, bundle: Path, fdti: Fdti) -> None:
    change, message = SEALED[case]
    resealed(bundle, change)
    refuse(bundle, f"(?i){message}", fdti, case)


@pytest.mark.parametrize("case", RAW)
def test_M22_manifest_that_is_not_strict_JSON(case: str, bundle: Path, fdti: Fdti) -> None:
    change, message = RAW[case]
    path = bundle / "manifest.json"
    path.write_bytes(change(path.read_bytes()))
    refuse(bundle, message, fdti, case)


TOML = '[accuracy]\nmetric = "iou"\n[target.cpu]\n'
BUDGETS = {
    "negative": TOML + "p50_ms = -1.0\n", "zero": TOML + "p50_ms = 0\n", "inf": TOML + "p50_ms = inf\n",
    "nan": TOML + "p50_ms = nan\n", "1e999": TOML + "p50_ms = 1e999\n", "text": TOML + 'p50_ms = "fast"\n',
    "true": TOML + "p50_ms = true\n", "twice": TOML + "p50_ms = 1.0\np50_ms = 2.0\n", "unknown": TOML + "p50 = 1.0\n",
    "empty": "", "not text": "\0\0\0", "a date": TOML + "p50_ms = 1979-05-27\n", "min_samples": '[accuracy]\nmetric = "iou"\nmin_samples = -3\n',
    "deep": "a = " + "[" * 5000, "JSON": "{}", "nobody": "[accuracy]\n",
}


@pytest.mark.parametrize("case", BUDGETS)
def test_M22_budgets(case: str, tmp_path: Path, fdti: Fdti) -> None:
    root = bundle_with(tmp_path, {"budgets.toml": BUDGETS[case].encode()})
    refuse(root, r"budgets\.toml: ", fdti, f"budgets.toml: {case}", ConfigError)


def _tensors(change: Callable[[dict[str, Any], bytes], tuple[bytes, bytes]]) -> bytes:
    """golden.safetensors with another header or other values."""
    raw = (toy_bundle() / "golden.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, body = change(json.loads(raw[8 : 8 + size]), raw[8 + size :])
    return len(header).to_bytes(8, "little") + header + body


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return next(value for key, value in header.items() if key != "__metadata__")


def _header(change: Callable[[dict[str, Any]], object]) -> bytes:
    def both(header: dict[str, Any], body: bytes) -> tuple[bytes, bytes]:
        change(header)
        return json.dumps(header).encode(), body

    return _tensors(both)


SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"", "cut": lambda: (toy_bundle() / "golden.safetensors").read_bytes()[:-1],
    "header of 2^40": lambda: (2**40).to_bytes(8, "little") + b"{}", "header past the end": lambda: (99).to_bytes(8, "little") + b"{}",
    "trailing bytes": lambda: (toy_bundle() / "golden.safetensors").read_bytes() + b"1234",
    "overlap": lambda: _header(lambda h: [v.update(data_offsets=[0, 4096]) for k, v in h.items() if k != "__metadata__"]),
    "shape": lambda: _header(lambda h: _first(h).update(shape=[1])),
    "shape overflow": lambda: _header(lambda h: _first(h).update(shape=[2**62, 8])),
    "negative shape": lambda: _header(lambda h: _first(h).update(shape=[-1])),
    "unknown type": lambda: _header(lambda h: _first(h).update(dtype="F7")),
    "another type": lambda: _header(lambda h: _first(h).update(dtype="I32")),
    "other names": lambda: _header(lambda h: h.update(x=h.pop(next(k for k in h if k != "__metadata__")))),
    "NaN": lambda: _tensors(lambda h, b: (json.dumps(h).encode(), b[:400] + np.float32(np.nan).tobytes() + b[404:])),
    "infinity": lambda: _tensors(lambda h, b: (json.dumps(h).encode(), b[:-4] + np.float32(np.inf).tobytes())),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_M22_golden_tensors(case: str, tmp_path: Path, fdti: Fdti) -> None:
    root = bundle_with(tmp_path, {"golden.safetensors": SAFETENSORS[case]()})
    refuse(root, "golden", fdti, f"safetensors: {case}")


@pytest.mark.parametrize("name", ["io.json", "golden.json", "input_statistics.json"])
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"inputs": NaN}', '{"a": 1, "a": 2}', "[" * 10**5, "\ufeff{}", '{"inputs": 1e999}'])
def test_M22_other_JSON_files(name: str, text: str, tmp_path: Path, fdti: Fdti) -> None:
    root = bundle_with(tmp_path, {name: text.encode()})
    with fdti.detecting(), pytest.raises((ArtifactError, ConfigError), match=name):
        open_bundle(root)


# Controls.


def _opens(root: Path) -> None:
    assert open_bundle(root).model_bytes("fp32") == fp32_model()


def test_M1_control_smallest_payload_file_may_be_empty(tmp_path: Path) -> None:
    _opens(bundle_with(tmp_path, {"notes.txt": b""}))


def test_M2_control_whole_file_passes(bundle: Path) -> None:
    _opens(bundle)


def test_M3_control_other_files_may_be_archives(tmp_path: Path) -> None:
    _opens(bundle_with(tmp_path, {"logs.gz": gzip.compress(b"x"), "page.html": b"<html>"}))


def test_M4_control_read_only_folder_opens(bundle: Path) -> None:
    for path in bundle.iterdir():
        path.chmod(0o444)
    bundle.chmod(0o555)
    try:
        _opens(bundle)
    finally:
        bundle.chmod(0o755)


def test_M5_control_folder_behind_a_link_opens(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(bundle)
    _opens(tmp_path / "current")


def test_M6_control_file_of_the_announced_size_passes(tmp_path: Path) -> None:
    _opens(bundle_with(tmp_path, {"large.bin": bytes(2**22)}))


def test_M22_control_resealed_manifest_passes(bundle: Path) -> None:
    resealed(bundle, lambda body: body["environment"].update(note="harmless"))
    _opens(bundle)
    assert (bundle / "manifest.json").stat().st_size < MAX_MANIFEST_BYTES
    assert open_artifact(bundle).manifest.environment["note"] == "harmless"
