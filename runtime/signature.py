"""Signatures of bundles: OpenSSF Model Signing (OMS 1.0) with a bare elliptic-curve key.

`model.sig` beside manifest.json is a Sigstore bundle around a DSSE envelope around an in-toto statement, which lists
every file with its hash. `fmdeploy sign` writes it with OpenSSF's model-signing; that package, `fmdeploy verify` and
any other OMS tool verify it. The device reads it here with nothing but `cryptography`: the hashes of the statement are
held against those of the bytes that were opened, so nothing is hashed a second time or read again by path, and no
network client is imported at boot.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmdeploy import strictjson
from fmdeploy.artifact import Artifact
from fmdeploy.errors import ArtifactError, InputError
from fmdeploy.manifest import MANIFEST_NAME, SIGNATURE_NAME
from fmdeploy.optional import require
from fmdeploy.plainfiles import open_below, open_folder, read_at_most

MAX_SIGNATURE_BYTES = 4 * 2**20
MAX_KEY_BYTES = 64 * 2**10
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
ABSENT, UNVERIFIED, VERIFIED = "absent", "not verified", "verified"


@dataclass(frozen=True)
class Signature:
    """What is known about a bundle's signature; every report says it.

    Attributes:
        state: "absent"; "not verified": there is one, nobody asked; "verified".
        key: sha256 of the public key that verified it; empty otherwise.
    """

    state: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.state} by key {self.key[:12]}" if self.key else self.state

    def note(self) -> str:
        """The line that a report prints: the loud one where nobody asked who made the files."""
        return f"signature: {self}" + ("" if self.state == VERIFIED else
                                       " (--require-signature was not given: whoever may write the folder decides)")

    def to_json(self) -> dict[str, str]:
        """Return plain JSON."""
        return {"state": self.state, "key": self.key}


def signature_of(artifact: Artifact, key: Path | None) -> Signature:
    """Say whether a bundle is signed, and verify that where a key is given.

    Raises:
        ArtifactError: A key is given, and it did not sign exactly these files.
        InputError: The key cannot be read.
    """
    if key is not None:
        return verify_signature(artifact, key)
    with open_folder(artifact.root) as folder:
        return Signature(ABSENT if _signature_bytes(folder, artifact.root) is None else UNVERIFIED)


def verify_signature(artifact: Artifact, key: Path) -> Signature:
    """Hold the signature in an opened bundle against a public key.

    Args:
        artifact: The bundle, just opened: its hashes are those of the bytes that were read.
        key: PEM file of the public key.

    Raises:
        ArtifactError: There is no signature, another key made it, it was altered, or it is over other files.
        InputError: The key cannot be read.
    """
    public = _public_key(key)
    with open_folder(artifact.root) as folder:
        raw = _signature_bytes(folder, artifact.root)
    path = artifact.root / SIGNATURE_NAME
    if raw is None:
        raise ArtifactError("is not signed: it has no model.sig", where=artifact.root,
                            fix="Sign it: fmdeploy sign BUNDLE --key PRIVATE.pem")
    envelope, hint = _envelope(raw, path)
    number = _fingerprint(public)
    if hint != number:
        raise ArtifactError("was signed with another key", where=path, expected=number[:12], found=hint[:12] or "none",
                            fix="Give the public key of whoever signed it, or sign it again")
    payload = _signed_payload(envelope, public, path)
    _require_same_files(_files(payload, path), _names(artifact), path)
    return Signature(VERIFIED, number)


def _signature_bytes(folder: int, root: Path) -> bytes | None:
    try:
        with open_below(folder, SIGNATURE_NAME, root, single=True) as (stream, status):
            raw = read_at_most(stream, MAX_SIGNATURE_BYTES + 1) if status.st_size <= MAX_SIGNATURE_BYTES else b""
    except ArtifactError as error:
        if error.what == "is missing":
            return None
        raise
    if not 0 < len(raw) <= MAX_SIGNATURE_BYTES:
        raise ArtifactError("is no signature", where=root / SIGNATURE_NAME, found=f"{status.st_size} bytes",
                            expected=f"1 to {MAX_SIGNATURE_BYTES} bytes", fix="Sign the bundle again")
    return raw


def key_bytes(path: Path) -> bytes:
    """The bytes of a PEM file.

    Raises:
        InputError: It is missing, no plain file, or too large.
    """
    try:
        if path.is_file() and path.stat().st_size <= MAX_KEY_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from error
    raise InputError("is not a key file", where=path, fix="Give a PEM file: openssl ecparam -name prime256v1 -genkey")


def _public_key(path: Path) -> Any:
    raw = key_bytes(path)
    serialization = require("cryptography.hazmat.primitives.serialization")
    if b"PRIVATE KEY" in raw:
        raise InputError("is a private key, which has no place on a device", where=path,
                         fix="Give the public one: openssl pkey -in PRIVATE.pem -pubout -out PUBLIC.pem")
    try:
        public = serialization.load_pem_public_key(raw)
    except Exception as error:  # ValueError, and UnsupportedAlgorithm, which is none
        raise InputError("is not a public key in PEM form", where=path) from error
    return _known_curve(public, path)


def _known_curve(key: Any, path: Path) -> Any:
    curve = getattr(getattr(key, "curve", None), "name", type(key).__name__)
    if curve not in CURVES:
        raise InputError("is a key of another kind", where=path, expected=" or ".join(CURVES), found=curve,
                         fix="openssl ecparam -name prime256v1 -genkey -noout -out PRIVATE.pem")
    return key


def _fingerprint(public: Any) -> str:
    """The sha256 that OMS writes as a key's hint: over its PEM form."""
    serialization = require("cryptography.hazmat.primitives.serialization")
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _envelope(raw: bytes, path: Path) -> tuple[dict[str, Any], str]:
    """The DSSE envelope and the hint of the key; a signature of another shape is none."""
    try:
        body = strictjson.loads(raw)
        material, envelope = body["verificationMaterial"], body["dsseEnvelope"]
        if body["mediaType"] != MEDIA_TYPE or envelope["payloadType"] != PAYLOAD_TYPE:
            raise ValueError("another media type")
        if len(envelope["signatures"]) != 1:
            raise ValueError("not exactly one signature")
        hint = material["publicKey"]["hint"]
        if not isinstance(hint, str):
            raise ValueError("no hint of the key")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_signature(path, error) from error
    return envelope, hint


def _no_signature(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"is not a signature by a bare key (OMS 1.0): {error!s:.100}", where=path,
                         fix="Sign the bundle again")


def _signed_payload(envelope: dict[str, Any], public: Any, path: Path) -> bytes:
    """The bytes that the key signed."""
    hashes = require("cryptography.hazmat.primitives.hashes")
    ec = require("cryptography.hazmat.primitives.asymmetric.ec")
    invalid = require("cryptography.exceptions").InvalidSignature
    try:
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
    except (binascii.Error, ValueError, KeyError, TypeError) as error:
        raise _no_signature(path, error) from error
    signed = f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} ".encode() + payload
    try:
        public.verify(signature, signed, ec.ECDSA(getattr(hashes, CURVES[public.curve.name])()))
    except invalid as error:
        raise ArtifactError("does not verify: the signature or what it covers was altered", where=path,
                            fix="Sign the bundle again") from error
    return payload


def _files(payload: bytes, path: Path) -> dict[str, str]:
    """Name to sha256 of every file that the statement covers."""
    try:
        body = strictjson.loads(payload)
        if body["_type"] != STATEMENT or body["predicateType"] != PREDICATE:
            raise ValueError("another statement")
        how, listed = body["predicate"]["serialization"], body["predicate"]["resources"]
        if how["method"] != "files" or how["hash_type"] != "sha256":
            raise ValueError("hashes of another kind")
        files = {str(one["name"]): str(one["digest"]) for one in listed if one["algorithm"] == "sha256"}
        if len(files) != len(listed):
            raise ValueError("a file is listed twice")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_signature(path, error) from error
    return files


def _names(artifact: Artifact) -> dict[str, str]:
    return {MANIFEST_NAME: artifact.manifest_sha256} | {n: e.sha256 for n, e in artifact.manifest.files.items()}


def _require_same_files(signed: dict[str, str], found: dict[str, str], path: Path) -> None:
    changed = sorted(name for name in signed.keys() & found.keys() if signed[name] != found[name])
    missing, extra = sorted(signed.keys() - found.keys()), sorted(found.keys() - signed.keys())
    if changed or missing or extra:
        parts = {"other content": changed, "signed but not here": missing, "here but not signed": extra}
        said = "; ".join(f"{what}: {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
                         for what, names in parts.items() if names)
        raise ArtifactError(f"is over other files ({said})", where=path,
                            fix="It belongs to another bundle, or the bundle was changed and sealed again")
