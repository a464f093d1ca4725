"""Opening files that somebody else may have placed: below one folder, through descriptors, never waited for.

A path is walked component by component from an open folder and no link is followed on the way, so that what is
checked, what is hashed and what is read are one file even while somebody exchanges names underneath.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from fmdeploy.errors import ArtifactError
from fmdeploy.likely import cause_of

CHUNK = 1 << 18  # fits a second-level cache
HEAD_BYTES = 512
MAX_DEPTH = 64  # folders in folders; no artifact has more than two
FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
REMEDY = "Copy the artifact again, or re-run the stage that wrote it"


@contextmanager
def open_folder(root: Path) -> Iterator[int]:
    """A descriptor of the folder `root`; `root` itself may be a link, since its owner named it.

    Raises:
        ArtifactError: It is missing, no folder, or may not be read.
    """
    try:
        handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ArtifactError("no such artifact", where=root, fix="Check the path, or run the stage that writes it"
                            ) from error
    except NotADirectoryError as error:
        cause = cause_of(_head(root)) or "it is a file"
        raise ArtifactError(f"is not an fmdeploy artifact, a folder with a manifest.json: {cause}", where=root,
                            fix="Name the folder; fmdeploy unpack opens a .tar or .zip") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"cannot be opened: {reason}", where=root, fix="Check its permissions") from error
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def open_below(
    folder: int, name: str, root: Path, *, single: bool = False
) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """Open the regular file `name` below an open folder.

    Args:
        folder: Descriptor of the folder.
        name: Relative name with "/" between its parts.
        root: The folder's path, for messages.
        single: Refuse a file that has a second name (a hard link).

    Raises:
        ArtifactError: It is missing, a link, behind a link, or no regular file.
    """
    handle = _open_parts(folder, PurePosixPath(name).parts, root / name)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise ArtifactError("is not a regular file", where=root / name, found=_kind(status.st_mode), fix=REMEDY)
    with os.fdopen(handle, "rb", buffering=0) as stream:
        if single and status.st_nlink != 1:
            raise ArtifactError("is a hard link: somebody else may change it", where=root / name,
                                expected="1 name", found=status.st_nlink, fix="Copy the bundle with cp -r")
        yield stream, status


def _open_parts(folder: int, parts: tuple[str, ...], path: Path, last: int = 0) -> int:
    at = os.dup(folder)
    try:
        for part in parts[:-1]:
            inner = _open_one(at, part, FLAGS | os.O_DIRECTORY, path)
            os.close(at)
            at = inner
        return _open_one(at, parts[-1], FLAGS | last, path)
    finally:
        os.close(at)


def _open_one(folder: int, name: str, flags: int, path: Path) -> int:
    try:
        return os.open(name, flags, dir_fd=folder)
    except OSError as error:
        why = "is not a regular file, or lies behind a link"
        with suppress(OSError):
            mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
            if stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and flags & os.O_DIRECTORY):
                why = f"cannot be read: {error.strerror}"
        if isinstance(error, FileNotFoundError):
            why = "is missing"
        raise ArtifactError(why, where=path, fix="Check its permissions" if "read" in why else REMEDY) from error


def read_below(folder: int, name: str, root: Path, *, size: int, sha256: str, single: bool = False) -> bytes:
    """Read a file of known size and hash: the very bytes that were hashed come back.

    Raises:
        ArtifactError: It is not a plain file, or not the one that was announced.
    """
    with open_below(folder, name, root, single=single) as (stream, status):
        require_size(stream, status, size, root / name)
        raw = read_at_most(stream, size + 1)
    if len(raw) != size or hashlib.sha256(raw).hexdigest() != sha256:
        raise altered(root / name, raw[:HEAD_BYTES], sha256, hashlib.sha256(raw).hexdigest())
    return raw


def verify_below(folder: int, name: str, root: Path, *, size: int, sha256: str, single: bool = False) -> None:
    """Hash a file without keeping it; otherwise like `read_below`."""
    with open_below(folder, name, root, single=single) as (stream, status):
        require_size(stream, status, size, root / name)
        digest, read, head = hashlib.sha256(), 0, b""
        buffer = memoryview(bytearray(min(CHUNK, size + 1)))  # one for all chunks: fresh memory costs more than hashing
        while read <= size and (count := stream.readinto(buffer)):  # type: ignore[attr-defined]
            digest.update(buffer[:count])
            head = head or bytes(buffer[: min(count, HEAD_BYTES)])
            read += count
    if digest.hexdigest() != sha256:
        raise altered(root / name, head, sha256, digest.hexdigest())


def read_at_most(stream: BinaryIO, count: int) -> bytes:
    """Read up to `count` bytes of an unbuffered stream."""
    parts: list[bytes] = []
    while count > 0 and (chunk := stream.read(min(count, 256 * CHUNK))):
        parts.append(chunk)
        count -= len(chunk)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def require_size(stream: BinaryIO, status: os.stat_result, size: int, path: Path) -> None:
    """Refuse a file of another size before a byte of it is hashed; name the cause where its first bytes tell.

    Raises:
        ArtifactError: The size differs.
    """
    if status.st_size != size:
        cause = cause_of(stream.read(HEAD_BYTES)) if size else ""
        raise ArtifactError("has another size" + (f"; {cause}" if cause else ""), where=path, expected=size,
                            found=status.st_size, fix=REMEDY)


def altered(path: Path, head: bytes, expected: str, found: str) -> ArtifactError:
    """The error for a file whose bytes are others than announced."""
    cause = cause_of(head)
    return ArtifactError("was altered: sha256 differs" + (f"; {cause}" if cause else ""), where=path,
                         expected=expected[:12], found=found[:12], fix=REMEDY)


def names_below(folder: int, root: Path) -> set[str]:
    """Relative names of everything below an open folder that is no real folder, links to folders included.

    Raises:
        ArtifactError: A folder may not be listed, or lies deeper than those of any artifact.
    """
    found: set[str] = set()
    waiting = [""]
    while waiting:
        base = waiting.pop()
        if base.count("/") > MAX_DEPTH:
            raise ArtifactError("holds folders nested too deep", where=root, expected=f"at most {MAX_DEPTH}",
                                fix="Remove what its manifest does not list")
        for entry in _entries(folder, base, root):
            if entry.is_dir(follow_symlinks=False):
                waiting.append(f"{base}{entry.name}/")
            else:
                found.add(base + entry.name)
    return found


def _entries(folder: int, base: str, root: Path) -> list[os.DirEntry[str]]:
    parts = PurePosixPath(base).parts
    handle = _open_parts(folder, parts, root / base, os.O_DIRECTORY) if parts else os.dup(folder)
    try:
        with os.scandir(handle) as entries:
            return list(entries)
    except OSError as error:
        raise ArtifactError(f"cannot be listed: {error.strerror}", where=root / base, fix="Check its permissions"
                            ) from error
    finally:
        os.close(handle)


def _head(path: Path) -> bytes:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b"?"
    with os.fdopen(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return b"?"
        return stream.read(HEAD_BYTES)


def _kind(mode: int) -> str:
    for test, name in ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"),
                       (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device")):
        if test(mode):
            return name
    return "something else"
