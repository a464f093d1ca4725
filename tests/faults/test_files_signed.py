"""Signatures and archives of bundles (faults.md 5.4, M23 and M24)."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fmdeploy.errors import ArtifactError, FmdeployError, InputError
from fmdeploy.runtime.bundle import open_bundle
from fmdeploy.runtime.signing import sign, verify
from fmdeploy.runtime.unpack import unpack
from support.badfiles import resealed
from support.bundles import make_bundle
from support.fdti import Fdti
from support.processes import FMDEPLOY
from support.runtimes import toy_bundle


def write_keys(folder: Path, name: str, key: Any = None) -> tuple[Path, Path]:
    """A key pair as `openssl ecparam -genkey` and `openssl pkey -pubout` write it."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                          serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM,
                                                     serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_keys(tmp_path_factory.mktemp("keys"), "vehicle")


@pytest.fixture(scope="module")
def signed_once(keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = Path(shutil.copytree(toy_bundle(), tmp_path_factory.mktemp("signed") / "bundle"))
    sign(bundle=str(root), key=str(keys[0]))
    return root


@pytest.fixture
def signed(signed_once: Path, tmp_path: Path) -> Path:
    """A signed bundle to break."""
    return Path(shutil.copytree(signed_once, tmp_path / "bundle"))


def refuse(root: Path, key: Path, message: str, fdti: Fdti, kind: type[FmdeployError] = ArtifactError) -> None:
    with fdti.detecting(), pytest.raises(kind, match=message) as caught:
        open_bundle(root, require_signature=key)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def altered(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "model.sig"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def restated(root: Path, change: Callable[[dict[str, Any]], object], private: Path) -> None:
    """Change the statement inside, and sign it again with the right key."""
    body = json.loads((root / "model.sig").read_text())
    statement = json.loads(base64.b64decode(body["dsseEnvelope"]["payload"]))
    change(statement)
    payload = json.dumps(statement).encode()
    kind = body["dsseEnvelope"]["payloadType"]
    key = serialization.load_pem_private_key(private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    from cryptography.hazmat.primitives import hashes

    made = key.sign(f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload, ec.ECDSA(hashes.SHA256()))
    body["dsseEnvelope"].update(payload=base64.b64encode(payload).decode())
    body["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(made).decode()
    (root / "model.sig").write_text(json.dumps(body))


def test_M23_missing_signature(signed: Path, keys: tuple[Path, Path], fdti: Fdti) -> None:
    (signed / "model.sig").unlink()
    refuse(signed, keys[1], r"is not signed: it has no model\.sig", fdti)
    assert open_bundle(signed).signature.state == "absent", "without the flag it opens, and says so"


def test_M23_wrong_key(signed: Path, tmp_path: Path, fdti: Fdti) -> None:
    refuse(signed, write_keys(tmp_path, "other")[1], "was signed with another key", fdti)


def test_M23_wrong_key_that_claims_to_be_the_right_one(signed: Path, keys: tuple[Path, Path], tmp_path: Path, fdti: Fdti) -> None:
    private, _ = write_keys(tmp_path, "other")
    hint = json.loads((signed / "model.sig").read_text())["verificationMaterial"]["publicKey"]["hint"]
    sign(bundle=str(signed), key=str(private))
    altered(signed, lambda body: body["verificationMaterial"]["publicKey"].update(hint=hint))
    refuse(signed, keys[1], "does not verify: the signature or what it covers was altered", fdti)


def test_M23_signature_over_other_files(signed: Path, keys: tuple[Path, Path], tmp_path: Path, fdti: Fdti) -> None:
    other = make_bundle(tmp_path / "other", width=4).root
    shutil.copy(signed / "model.sig", other)
    refuse(other, keys[1], r"is over other files \(other content: golden", fdti)


def test_M23_bundle_changed_and_sealed_again(signed: Path, keys: tuple[Path, Path], fdti: Fdti) -> None:
    resealed(signed, lambda body: body["environment"].update(note="evil"))
    assert open_bundle(signed).signature.state == "not verified"
    refuse(signed, keys[1], r"is over other files \(other content: manifest\.json\)", fdti)


@pytest.mark.parametrize("change", [
    lambda s: s["predicate"]["resources"].pop(), lambda s: s["predicate"]["resources"].append(
        {"name": "extra.bin", "algorithm": "sha256", "digest": "0" * 64}),
    lambda s: s["predicate"]["resources"][0].update(digest="0" * 64),
    lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0]),
    lambda s: s["predicate"]["serialization"].update(hash_type="blake3"),
    lambda s: s.update(predicateType="https://model_signing/Digests/v0.1"), lambda s: s.clear(),
    lambda s: s["predicate"].update(resources="all of them")],
    ids=["one less", "one more", "other hash", "one twice", "other kind of hash", "older statement", "nothing", "nonsense"])
def test_M23_statement_that_does_not_cover_the_files(change: Any, signed: Path, keys: tuple[Path, Path], fdti: Fdti) -> None:
    restated(signed, change, keys[0])
    refuse(signed, keys[1], r"(is over other files|is not a signature by a bare key)", fdti)


ENVELOPES: dict[str, Callable[[dict[str, Any]], object]] = {
    "payload": lambda b: b["dsseEnvelope"].update(payload=base64.b64encode(b"{}").decode()),
    "payload no base64": lambda b: b["dsseEnvelope"].update(payload="!!"),
    "payload is a number": lambda b: b["dsseEnvelope"].update(payload=5),
    "payload type": lambda b: b["dsseEnvelope"].update(payloadType="text/plain"),
    "signature": lambda b: b["dsseEnvelope"]["signatures"][0].update(sig=base64.b64encode(b"0" * 70).decode()),
    "no signature": lambda b: b["dsseEnvelope"].update(signatures=[]),
    "two signatures": lambda b: b["dsseEnvelope"].update(signatures=b["dsseEnvelope"]["signatures"] * 2),
    "media type": lambda b: b.update(mediaType="x"), "no hint": lambda b: b["verificationMaterial"]["publicKey"].pop("hint"),
    "a certificate": lambda b: b.update(verificationMaterial={"certificate": {"rawBytes": ""}}), "empty": lambda b: b.clear(),
}


@pytest.mark.parametrize("case", ENVELOPES)
def test_M23_altered_envelope(case: str, signed: Path, keys: tuple[Path, Path], fdti: Fdti) -> None:
    altered(signed, ENVELOPES[case])
    refuse(signed, keys[1], r"(does not verify|is not a signature by a bare key)", fdti)


@pytest.mark.timeout(60)
def test_M23_signature_that_is_no_file_and_garbage(signed: Path, keys: tuple[Path, Path], fdti: Fdti) -> None:
    path = signed / "model.sig"
    for raw in (b"", b"\0" * 99, b"[" * 10**5, b"{}", b"[]", b"null", b"x" * (5 * 2**20)):
        path.write_bytes(raw)
        refuse(signed, keys[1], r"(is no signature|is not a signature by a bare key)", fdti)
    path.unlink()
    path.symlink_to("/dev/zero")
    refuse(signed, keys[1], "regular file", fdti)


def test_M23_keys_that_are_no_keys(signed: Path, keys: tuple[Path, Path], tmp_path: Path, fdti: Fdti) -> None:
    (tmp_path / "text.pub").write_text("hello")
    refuse(signed, tmp_path / "text.pub", "is not a public key", fdti, InputError)
    refuse(signed, tmp_path / "missing.pub", "is not a key file", fdti, InputError)
    refuse(signed, tmp_path, "is not a key file", fdti, InputError)
    refuse(signed, keys[0], "is a private key, which has no place on a device", fdti, InputError)
    refuse(signed, write_keys(tmp_path, "ed", ed25519.Ed25519PrivateKey.generate())[1], "a key of another kind", fdti, InputError)
    refuse(signed, write_keys(tmp_path, "k1", ec.generate_private_key(ec.SECP256K1()))[1], "a key of another kind", fdti, InputError)
    with pytest.raises(InputError, match="is not a private key"):
        sign(bundle=str(signed), key=str(keys[1]))


def test_M23_only_bundles_have_an_unlisted_file(signed: Path, fdti: Fdti) -> None:
    (signed / "sub").mkdir()
    (signed / "sub" / "model.sig").write_bytes(b"x")
    with fdti.detecting(), pytest.raises(ArtifactError, match=r"does not list: sub/model\.sig"):
        open_bundle(signed)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda c: c.name)
def test_M23_control_signed_bundle_opens_with_its_key(curve: ec.EllipticCurve, tmp_path: Path) -> None:
    root = Path(shutil.copytree(toy_bundle(), tmp_path / "bundle"))
    private, public = write_keys(tmp_path, "k", ec.generate_private_key(curve))
    before = open_bundle(root).digest
    sign(bundle=str(root), key=str(private))
    sign(bundle=str(root), key=str(private))  # again: the older one is replaced
    opened = open_bundle(root, require_signature=public)
    assert opened.signature.state == "verified"
    assert opened.digest == before, "signing is no part of the bundle's identity"
    assert "verified" in verify(bundle=str(root), key=str(public)).lines[0]
    # The other implementation of the same specification.
    from fmdeploy.optional import require

    require("model_signing.verifying").Config().use_elliptic_key_verifier(public_key=public).verify(root, root / "model.sig")


def test_M23_control_verbs_and_messages(signed: Path, keys: tuple[Path, Path]) -> None:
    done = subprocess.run([*FMDEPLOY, "verify", str(signed), "--key", str(keys[1]), "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["signature"]["state"] == "verified"
    (signed / "model.sig").unlink()
    done = subprocess.run([*FMDEPLOY, "verify", str(signed), "--key", str(keys[1])], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "is not signed" in done.stderr


def test_M23_control_verifying_imports_no_network_client(signed: Path, keys: tuple[Path, Path]) -> None:
    code = f"""
import sys
from pathlib import Path
from fmdeploy.runtime.bundle import open_bundle
print(open_bundle({str(signed)!r}, require_signature=Path({str(keys[1])!r})).signature.state)
print(sorted(set(sys.modules) & {{"model_signing", "sigstore", "requests", "urllib3", "tuf", "OpenSSL", "pickle", "torch", "onnx"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "verified"
    assert set(eval(lines[1])) <= {"pickle"}, "numpy imports pickle; nothing here does"


@pytest.mark.parametrize("verb", ["bench", "check", "evaluate", "run"])
def test_M23_every_verb_that_opens_a_bundle_can_demand_a_signature(verb: str, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    from fmdeploy.runtime.check.check import check
    from fmdeploy.runtime.measure.bench import bench
    from fmdeploy.runtime.run import run
    from fmdeploy.runtime.trouble.evaluate import evaluate

    stages: dict[str, Any] = {"bench": bench, "check": check, "evaluate": evaluate, "run": run}
    data = {} if verb == "bench" else {"data": tmp_path / "none"}
    out = {} if verb == "bench" else {"out": tmp_path / "out"}
    with pytest.raises(ArtifactError, match="is not signed"):
        stages[verb](bundle=toy_bundle(), require_signature=keys[1], **data, **out)


def test_M23_bench_says_who_signed(signed: Path, keys: tuple[Path, Path]) -> None:
    from fmdeploy.runtime.measure.bench import bench

    found = bench(bundle=signed, require_signature=keys[1], tiers=("fp32",), runs=30)
    assert found.data["signature"]["state"] == "verified"
    assert any(line.startswith("signature: verified by key") for line in found.lines)
    assert set(found.data["tiers"]["fp32"]) >= {"n", "p50_ms", "p95_ms", "p99_ms", "max_ms", "peak_mib", "memory"}
    assert found.data["environment"]["machine"]


# M24: archives.


def tar_of(root: Path, *, prefix: str = "bundle/", extra: Callable[[tarfile.TarFile], object] | None = None) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in sorted(root.iterdir()):
            archive.add(path, f"{prefix}{path.name}")
        if extra is not None:
            extra(archive)
    return packed.getvalue()


def member(name: str, *, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644, size: int = 0) -> Callable[[tarfile.TarFile], object]:
    def add(archive: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.mode, info.size = kind, link, mode, size
        archive.addfile(info, io.BytesIO(bytes(size)))

    return add


TARS: dict[str, tuple[Callable[[tarfile.TarFile], object], str]] = {
    "traversal": (member("../../evil"), "leaves the artifact"),
    "traversal inside": (member("bundle/../../evil"), "leaves the artifact"),
    "absolute": (member("/tmp/evil"), "leaves the artifact"),
    "symbolic link": (member("bundle/link", kind=tarfile.SYMTYPE, link="/etc/passwd"), "a symbolic link"),
    "link then file through it": (member("bundle/dir", kind=tarfile.SYMTYPE, link="/tmp"), "a symbolic link"),
    "hard link": (member("bundle/hard", kind=tarfile.LNKTYPE, link="bundle/io.json"), "a hard link"),
    "device": (member("bundle/dev", kind=tarfile.CHRTYPE), "a device or FIFO"),
    "FIFO": (member("bundle/fifo", kind=tarfile.FIFOTYPE), "a device or FIFO"),
    "setuid": (member("bundle/suid", mode=0o4755), "setuid"),
    "twice": (member("bundle/io.json", size=5), "'bundle/io.json' twice"),
    "twice in other case": (member("bundle/IO.json", size=5), "twice"),
    "unlisted": (member("bundle/extra.bin", size=5), "does not list: extra.bin"),
    "escape codes": (member("bundle/\x1b[2J"), "not a name"),
    "manifest again, elsewhere": (member("manifest.json", size=5), r"no manifest\.json|strict JSON|lacks|list"),
}


def refuse_archive(raw: bytes, message: str, tmp_path: Path, fdti: Fdti, name: str = "bundle.tar") -> None:
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in" / name).write_bytes(raw)
    before = sorted(tmp_path.rglob("*"))
    with fdti.detecting(name), pytest.raises(ArtifactError, match=message) as caught:
        unpack(archive=str(tmp_path / "in" / name), out=str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize("case", TARS)
def test_M24_tar_that_is_up_to_something(case: str, tmp_path: Path, fdti: Fdti) -> None:
    extra, message = TARS[case]
    refuse_archive(gzip.compress(tar_of(toy_bundle(), extra=extra), 1), message, tmp_path, fdti, "bundle.tar.gz")


@pytest.mark.parametrize("header", [{"comment": "x" * 100_000}, {"path": "bundle/" + "x" * 100_000}])
def test_M24_tar_with_headers_without_end(header: dict[str, str], tmp_path: Path, fdti: Fdti) -> None:
    def add(archive: tarfile.TarFile) -> None:
        info = tarfile.TarInfo("bundle/extra")
        info.pax_headers = header
        archive.addfile(info)

    refuse_archive(tar_of(toy_bundle(), extra=add), "header that is too large", tmp_path, fdti)


def test_M24_refusal_names_the_archive_not_the_folder_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "extra.tar").write_bytes(tar_of(toy_bundle(), extra=TARS["unlisted"][0]))
    with pytest.raises(ArtifactError, match="does not list") as caught:
        unpack(archive=str(tmp_path / "extra.tar"), out=str(tmp_path / "out"))
    assert str(tmp_path / "extra.tar") in str(caught.value)
    assert ".unpack" not in str(caught.value)


def zip_of(root: Path, *, extra: dict[str, bytes] | None = None, mode: int = 0, encrypted: bool = False) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.iterdir()):
            archive.write(path, path.name)
        for name, raw in (extra or {}).items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, raw)
    raw = packed.getvalue()
    if encrypted:  # the flag in the central directory, which is what a reader believes
        at = raw.rindex(b"PK\x01\x02")
        raw = raw[: at + 8] + b"\x01" + raw[at + 9 :]
    return raw


ZIPS: dict[str, tuple[dict[str, Any], str]] = {
    "traversal": ({"extra": {"../evil": b"x"}}, "leaves the artifact"),
    "absolute": ({"extra": {"/tmp/evil": b"x"}}, "leaves the artifact"),
    "backslash": ({"extra": {"..\\evil": b"x"}}, "leaves the artifact"),
    "symbolic link": ({"extra": {"link": b"/etc/passwd"}, "mode": stat.S_IFLNK | 0o777}, "a link or a device"),
    "device": ({"extra": {"dev": b""}, "mode": stat.S_IFCHR | 0o666}, "a link or a device"),
    "setuid": ({"extra": {"suid": b""}, "mode": stat.S_IFREG | 0o4755}, "setuid"),
    "unlisted": ({"extra": {"extra.bin": b"x"}}, "does not list: extra.bin"),
    "encrypted": ({"encrypted": True}, "is encrypted"),
}


@pytest.mark.parametrize("case", ZIPS)
def test_M24_zip_that_is_up_to_something(case: str, tmp_path: Path, fdti: Fdti) -> None:
    options, message = ZIPS[case]
    refuse_archive(zip_of(toy_bundle(), **options), message, tmp_path, fdti, "bundle.zip")


def test_M24_zip_with_one_name_twice(tmp_path: Path, fdti: Fdti) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        raw = zip_of(toy_bundle(), extra={"io.json": b"{}"})
    refuse_archive(raw, "holds 'io.json' twice", tmp_path, fdti, "bundle.zip")


@pytest.mark.parametrize("how", ["tar.gz", "tar.xz", "zip", "header"])
def test_M24_decompression_bomb(how: str, tmp_path: Path, fdti: Fdti) -> None:
    size = 80 * 2**20
    if how == "zip":
        raw = zip_of(toy_bundle(), extra={"zeros.bin": bytes(size)})
    else:
        bomb = member("bundle/zeros.bin", size=size)
        if how == "header":  # a name of 80 MiB, in the header that long names have
            bomb = member("././@LongLink", kind=tarfile.GNUTYPE_LONGNAME, size=size)
        plain = tar_of(toy_bundle(), extra=bomb)
        raw = lzma.compress(plain, preset=0) if how == "tar.xz" else gzip.compress(plain, 1)
    assert len(raw) < size / 30
    refuse_archive(raw, "header that is too large" if how == "header" else "a decompression bomb", tmp_path, fdti, f"bundle.{how}")


@pytest.mark.parametrize("raw", [b"", b"hello", gzip.compress(b"hello"), bytes(20000), b"PK\x03\x04" + bytes(50),
                                 b"<html>404</html>", gzip.compress(bytes(10240))[:-20]],
                         ids=["empty", "text", "gzip of text", "zeros", "cut zip", "HTML", "cut gzip"])
def test_M24_files_that_are_no_archives(raw: bytes, tmp_path: Path, fdti: Fdti) -> None:
    refuse_archive(raw, r"(cannot be unpacked|neither a tar nor a zip|manifest\.json)", tmp_path, fdti)


def test_M24_archive_given_as_a_bundle(tmp_path: Path, fdti: Fdti) -> None:
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(tar_of(toy_bundle())))
    with fdti.detecting(), pytest.raises(ArtifactError, match="gzip-compressed.*fmdeploy unpack"):
        open_bundle(tmp_path / "b.tar.gz")


@pytest.mark.parametrize("how", ["tar", "tar.gz", "tar.bz2", "tar.xz", "zip", "flat"])
def test_M24_control_packed_bundle_comes_out_whole(how: str, signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    pack: dict[str, Callable[[bytes], bytes]] = {"tar": bytes, "tar.gz": gzip.compress, "tar.bz2": bz2.compress,
                                                 "tar.xz": lzma.compress, "flat": bytes}
    raw = zip_of(signed) if how == "zip" else pack[how](tar_of(signed, prefix="./" if how == "flat" else "bundle/"))
    (tmp_path / "packed").write_bytes(raw)
    assert unpack(archive=str(tmp_path / "packed"), out=str(tmp_path / "out")).digest == open_bundle(signed).digest
    assert open_bundle(tmp_path / "out", require_signature=keys[1]).model_bytes("fp32")
    with pytest.raises(ArtifactError, match="already exists"):
        unpack(archive=str(tmp_path / "packed"), out=str(tmp_path / "out"))
