"""Encodings by their spelling.

    features   float16  float32  int8  pca:AMOUNT+float16|float32|int8 (AMOUNT: 64 components, or 0.99 of the variance)
    outputs    float16  float32  int8  uint8  topk:K
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from fmdeploy.errors import ArtifactError, ConfigError
from fmdeploy.task import Arrays
from fmdeploy.teacher.encodings.base import Encoding
from fmdeploy.teacher.encodings.floats import Float16, Float32
from fmdeploy.teacher.encodings.int8 import Int8
from fmdeploy.teacher.encodings.pca import BASIS, MEAN, Pca
from fmdeploy.teacher.encodings.probability import Probability
from fmdeploy.teacher.encodings.topk import TopK

PLAIN = ("float16", "float32", "int8")
FEATURE_SPELLINGS = (*PLAIN, "pca:K+ENCODING", "pca:SHARE+ENCODING")
OUTPUT_SPELLINGS = (*PLAIN, "uint8", "topk:K")
DEFAULT_SHARE = "0.99"


class Spelling(NamedTuple):
    """An encoding's name, its number, and the encoding inside it."""

    name: str
    amount: float = 0.0
    inner: str = ""

    def __str__(self) -> str:
        amount = f":{self.amount:g}" if self.amount else ""
        return self.name + amount + (f"+{self.inner}" if self.inner else "")


def read_feature(text: str) -> Spelling:
    """Parse the encoding of features.

    Raises:
        ConfigError: there is no such encoding.
    """
    if text in PLAIN:
        return Spelling(text)
    head, _, inner = text.partition("+")
    name, _, amount = head.partition(":")
    if name == "pca" and (inner or "float16") in PLAIN:
        number = _number(amount or DEFAULT_SHARE)
        if 0 < number < 1 or (number >= 1 and number == int(number)):
            return Spelling("pca", number, inner or "float16")
    raise ConfigError("no such encoding of features", where="encoding", found=text,
                      expected=", ".join(FEATURE_SPELLINGS))


def read_output(text: str) -> Spelling:
    """Parse the encoding of outputs.

    Raises:
        ConfigError: there is no such encoding.
    """
    if text in (*PLAIN, "uint8"):
        return Spelling(text)
    name, _, amount = text.partition(":")
    number = _number(amount)
    if name == "topk" and number >= 1 and number == int(number):
        return Spelling(name, number)
    raise ConfigError("no such encoding of outputs", where="logits", expected=", ".join(OUTPUT_SPELLINGS), found=text)


def make(name: str, spelling: Spelling, shape: tuple[int, ...], *, is_feature: bool, state: Arrays | None = None
         ) -> Encoding:
    """The encoding of the array `name` with `shape` for one sample.

    Args:
        name: For messages.
        spelling: From `read_feature` or `read_output`.
        shape: Without the batch axis.
        is_feature: Features have tokens: int8 scales go over their channels, not over planes.
        state: `basis` and `mean` of a PCA.

    Raises:
        ConfigError: an array of this shape cannot be stored so.
        ArtifactError: the stored basis does not fit the array.
    """
    if spelling.name == "topk":
        return _topk(name, spelling, shape)
    if spelling.name == "pca":
        return _pca(name, spelling, shape, state or {})
    if spelling.name == "int8":
        return Int8(shape, (0,) if is_feature or len(shape) < 2 else tuple(range(1, len(shape))))
    plain: dict[str, Callable[[tuple[int, ...]], Encoding]] = {
        "float16": Float16, "float32": Float32, "uint8": Probability}
    return plain[spelling.name](shape)


def _topk(name: str, spelling: Spelling, shape: tuple[int, ...]) -> Encoding:
    if len(shape) != 1 or spelling.amount > shape[0]:
        raise ConfigError("only a vector of at least K classes can keep its top K", where=name, found=shape,
                          expected=f"({int(spelling.amount)} or more,)", fix=f"--logits {name}=uint8, int8 or float16")
    return TopK(shape, int(spelling.amount))


def _pca(name: str, spelling: Spelling, shape: tuple[int, ...], state: Arrays) -> Encoding:
    basis_KD, mean_D = state.get(BASIS), state.get(MEAN)
    if basis_KD is None or mean_D is None or basis_KD.shape[1:] != shape[:1] or mean_D.shape != shape[:1]:
        raise ArtifactError("the stored components do not fit the array", where=name, expected=shape,
                            found=None if basis_KD is None else basis_KD.shape, fix="Build it again: fmdeploy cache")
    inner = make(name, Spelling(spelling.inner), (len(basis_KD), *shape[1:]), is_feature=True)
    return Pca(shape, basis_KD, mean_D, inner)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0
