"""`fmdeploy sign` and `fmdeploy verify`: signatures of bundles by a bare key, without a network."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import Field

from fmdeploy.artifact import open_artifact
from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath, Positional, StageConfig
from fmdeploy.errors import ConfigError, InputError
from fmdeploy.manifest import SIGNATURE_NAME, Kind
from fmdeploy.optional import require
from fmdeploy.runtime.signature import key_bytes, verify_signature


class SignConfig(StageConfig):
    """Options of `fmdeploy sign`."""

    bundle: Annotated[InputPath, Positional()] = Field(description="Folder of a BUNDLE")
    key: InputPath = Field(description="PEM file of an elliptic-curve private key (P-256, P-384 or P-521), unencrypted")


class VerifyConfig(StageConfig):
    """Options of `fmdeploy verify`."""

    bundle: Annotated[InputPath, Positional()] = Field(description="Folder of a BUNDLE")
    key: InputPath = Field(description="PEM file of the public key")


@command(SignConfig)
def sign(config: SignConfig) -> Outcome:
    """Sign a bundle: write model.sig (OpenSSF Model Signing) into it. An older signature is replaced."""
    artifact = open_artifact(config.bundle, Kind.BUNDLE)
    raw = key_bytes(config.key)
    if b"PRIVATE KEY" not in raw:
        raise InputError("is not a private key in PEM form", where=config.key,
                         fix="openssl ecparam -name prime256v1 -genkey -noout -out PRIVATE.pem")
    signing, hashing = require("model_signing.signing"), require("model_signing.hashing")
    target = artifact.root / SIGNATURE_NAME
    scratch = artifact.root.parent / f".{artifact.root.name}.{os.getpid()}.sig"
    covered = hashing.Config().set_ignored_paths(paths=[target], ignore_git_paths=False)
    try:
        made = signing.Config().use_elliptic_key_signer(private_key=config.key).set_hashing_config(covered)
        made.sign(artifact.root, scratch)
        os.chmod(scratch, 0o644)
        os.replace(scratch, target)
    except (ValueError, TypeError) as error:  # no such curve, an encrypted key
        raise ConfigError(f"cannot sign: {error}", where=config.key,
                          expected="an unencrypted P-256, P-384 or P-521 key") from error
    finally:
        scratch.unlink(missing_ok=True)
    found = {"bundle": artifact.digest, "signature": str(target)}
    return Outcome((f"signed BUNDLE {artifact.digest[:12]}: {target}",), found)


@command(VerifyConfig)
def verify(config: VerifyConfig) -> Outcome:
    """Verify a bundle and its signature against a public key; exit 2 with the reason where it does not hold."""
    artifact = open_artifact(config.bundle, Kind.BUNDLE)
    found = verify_signature(artifact, config.key)
    data = {"bundle": artifact.digest, "signature": found.to_json()}
    return Outcome((f"BUNDLE {artifact.digest[:12]}: signature {found}",), data)
