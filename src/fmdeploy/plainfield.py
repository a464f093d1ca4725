"""Values that go into generated files: Dockerfiles, unit files, compose files.

A newline in such a value becomes a line of its own, and `$(…)`, `;` or a quote becomes a command (the class of
CVE-2026-44346). Escaping differs from format to format, so nothing is escaped here: only characters that mean nothing
in any of these formats pass.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from fmdeploy.errors import InputError

PLAIN = re.compile(r"[A-Za-z0-9_/.@+=,:-]+", re.ASCII)
IMAGE = re.compile(r"[a-z0-9]+(?:[._:/-]+[A-Za-z0-9_]+)*(?:@sha256:[0-9a-f]{64})?", re.ASCII)
USER = re.compile(r"[0-9]{1,9}:[0-9]{1,9}", re.ASCII)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)
FOLDER = re.compile(r"/(?:[A-Za-z0-9_.@+-]+/?)*", re.ASCII)  # no comma, colon or "=", which separate mount options


def matching(pattern: re.Pattern[str], what: str, text: str) -> str:
    """`text`, where all of it matches.

    Raises:
        ValueError: it does not; the text names the first character that cannot be in any plain field.
    """
    if pattern.fullmatch(text):
        return text
    strange = next((repr(c) for c in text if not PLAIN.fullmatch(c)), None)
    raise ValueError(f"is not {what}" + (f": it holds {strange}" if strange else ""))


def plain_field(text: str, *, where: str, pattern: re.Pattern[str] = PLAIN) -> str:
    """`text`, where it can stand in any generated file; for values that no configuration has checked.

    Raises:
        InputError: it is empty, or holds a character with a meaning in one of the formats.
    """
    try:
        return matching(pattern, "an absolute, plain path" if pattern is FOLDER else "a plain field", text)
    except ValueError as error:
        raise InputError(str(error), where=where, found=repr(text),
                         fix="Use letters, digits and _ . @ + - only") from error


ImageName = Annotated[str, AfterValidator(lambda text: matching(IMAGE, "the name of an image", text))]
UserName = Annotated[str, AfterValidator(lambda text: matching(USER, "a numeric user:group, like 10001:10001", text))]
PlainName = Annotated[str, AfterValidator(lambda text: matching(NAME, "a plain name", text))]
PlainFolder = Annotated[str, AfterValidator(lambda text: matching(FOLDER, "an absolute, plain path", text))]
