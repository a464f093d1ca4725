"""TOML files and bytes as plain values, bounded in size and depth."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fmdeploy.errors import ConfigError
from fmdeploy.strictjson import require_depth

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - JetPack 6 has Python 3.10
    import tomli as tomllib

MAX_TOML_BYTES = 4 * 2**20


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        ConfigError: it is missing or not TOML; the text names the line.
    """
    if not path.is_file():
        raise ConfigError("no such configuration file", where=path)
    with path.open("rb") as stream:
        return parse_toml(stream.read(MAX_TOML_BYTES + 1), path)


def parse_toml(raw: bytes, path: Path) -> dict[str, Any]:
    """Parse the bytes of a TOML file; `path` is for messages.

    Raises:
        ConfigError: it is not TOML, or larger than any configuration.
    """
    if len(raw) > MAX_TOML_BYTES:
        raise ConfigError("is too large for a configuration", where=path, expected=f"at most {MAX_TOML_BYTES} bytes")
    try:
        found = tomllib.loads(raw.decode("utf-8"))
        require_depth(found)
        return found
    except RecursionError as error:
        raise ConfigError("is not TOML: it is nested too deep", where=path) from error
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError, a number or a date that cannot be
        raise ConfigError(f"is not TOML: {error}", where=path, fix=_is_yaml(raw, path)) from error


def _is_yaml(raw: bytes, path: Path) -> str | None:
    looks = path.suffix.lower() in (".yaml", ".yml") or raw.lstrip().startswith((b"---", b"%YAML"))
    return "YAML is not read here: write the same keys as TOML, key = value" if looks else None
