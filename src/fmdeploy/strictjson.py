"""JSON without the parts that two readers may understand differently."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 100  # nested objects and lists; the lineage of five stages is 14 deep


def loads(raw: bytes, *, max_depth: int = MAX_DEPTH) -> Any:
    """Parse UTF-8 JSON: no duplicate keys, no NaN or infinity (also not spelled 1e999), no byte order mark.

    Raises:
        ValueError: It is anything else; also for what nests too deep.
    """
    if raw.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it begins with a byte order mark (BOM)")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant,
                           parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    require_depth(value, max_depth)
    return value


def require_depth(value: Any, limit: int = MAX_DEPTH) -> None:
    """Check how deep objects and lists are nested; no recursion here, so that there is none later.

    Raises:
        ValueError: deeper than `limit`.
    """
    level = [value]
    for _ in range(limit):
        level = [inner for one in level for inner in _inside(one) if isinstance(inner, (dict, list))]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {limit}")


def _inside(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("duplicate key")
    return out


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def finite_or_none(value: float) -> float | None:
    """What JSON can hold of a number: None in place of NaN and infinity."""
    return value if math.isfinite(value) else None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value
