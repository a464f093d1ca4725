"""`fmdeploy unpack`: a tar or zip archive of an artifact, taken apart without trusting a word of it.

Only regular files and folders come out, under names that a manifest could list, each once; what is decompressed is
counted while it is, whatever the archive's headers say. The folder appears only after it has opened as an artifact.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple

from pydantic import Field

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.command import command
from fmdeploy.config import InputPath, OutputPath, Positional, StageConfig
from fmdeploy.errors import ArtifactError
from fmdeploy.likely import cause_of
from fmdeploy.manifest import MANIFEST_NAME, MAX_DEVICE_BYTES, MAX_DEVICE_FILES, SIGNATURE_NAME, unusable_name

MAX_RATIO = 100  # bytes out for a byte in; sparse grids of 0 and 1 come near 50
FREE_BYTES = 64 * 2**20  # below this the ratio does not matter
CHUNK = 1 << 20
MAX_HEADER_BYTES = 1 << 16
EXTRA_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
                 tarfile.GNUTYPE_LONGLINK)
REFUSED = "Nothing was unpacked. Ask for another archive"


class UnpackConfig(StageConfig):
    """Options of `fmdeploy unpack`."""

    archive: Annotated[InputPath, Positional()] = Field(description="A .tar, .tar.gz, .tar.xz or .zip file")
    out: OutputPath = Field(description="Folder to write; must not exist")


class Entry(NamedTuple):
    """One file of an archive: its name, and how to open it."""

    name: str
    open: Callable[[], IO[bytes]]


@command(UnpackConfig)
def unpack(config: UnpackConfig) -> Artifact:
    """Unpack an archived artifact, such as a bundle, and verify it; nothing is left of one that is refused."""
    out = Path(os.path.abspath(config.out))
    if os.path.lexists(out):
        raise ArtifactError("already exists", where=out, fix="Choose another --out")
    scratch = out.parent / f".{out.name}.{os.getpid()}.unpack"
    try:
        scratch.mkdir(parents=True)
        _unpack(config.archive, scratch)
        found = _artifact_in(scratch)
        _open(found, config.archive)
        os.rename(found, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return open_artifact(out)


def _open(found: Path, archive: Path) -> None:
    """Verify what came out; errors name the archive, since the folder will be gone."""
    try:
        open_artifact(found)
    except ArtifactError as error:
        where = str(error.where).replace(str(found), str(archive))
        raise ArtifactError(error.what, where=where, expected=error.expected, found=error.found, fix=error.fix
                            ) from error


def _artifact_in(folder: Path) -> Path:
    """The folder itself, or the one folder in it: both ways of packing are common."""
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def _unpack(archive: Path, folder: Path) -> None:
    handle = _open_plain(archive)
    with os.fdopen(handle, "rb") as stream:
        size = os.fstat(handle).st_size
        meter = Meter(max(FREE_BYTES, MAX_RATIO * size), archive)
        try:
            if zipfile.is_zipfile(stream):
                with zipfile.ZipFile(stream) as packed:
                    _write_all(list(_zip_entries(packed, archive)), folder, meter, archive)
            else:
                stream.seek(0)
                head = stream.read(512)
                stream.seek(0)
                _unpack_tar(stream, head, folder, meter, archive)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError, NotImplementedError
                ) as error:
            raise ArtifactError(f"cannot be unpacked: {str(error) or type(error).__name__:.150}", where=archive,
                                fix="Copy it again") from error


def _open_plain(archive: Path) -> int:
    try:
        handle = os.open(archive, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ArtifactError(f"cannot be opened: {error.strerror}", where=archive, fix="Check the path") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ArtifactError("is not a file", where=archive, fix="Name a .tar or .zip file")
    return handle


class Meter:
    """Counts what comes out of an archive, and stops it."""

    def __init__(self, limit: int, archive: Path) -> None:
        self.left, self.limit, self.archive = min(limit, MAX_DEVICE_BYTES), min(limit, MAX_DEVICE_BYTES), archive

    def spend(self, count: int) -> None:
        """Take from what is left.

        Raises:
            ArtifactError: It is more than such an archive may hold.
        """
        self.left -= count
        if self.left < 0:
            raise ArtifactError("unpacks to too much: a decompression bomb", where=self.archive,
                                expected=f"at most {self.limit} bytes", fix=REFUSED)


class BoundedInfo(tarfile.TarInfo):
    """A member whose extra headers are short: long names and attributes are read whole, before anybody asks."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> BoundedInfo:
        """Make a member of its header block."""
        found = super().frombuf(buf, encoding, errors)
        if found.size > MAX_HEADER_BYTES and found.type in EXTRA_HEADERS:
            raise ArtifactError("holds a header that is too large", where="tar archive", expected=MAX_HEADER_BYTES,
                                found=found.size, fix=REFUSED)
        return found


class Metered:
    """The decompressed stream below tarfile: its headers count as well, since they can be as large as they say."""

    def __init__(self, stream: IO[bytes], meter: Meter) -> None:
        self.stream, self.meter = stream, meter

    def read(self, count: int = -1) -> bytes:
        """Read, counted: never more at once than may still come."""
        bound = self.meter.left + 1
        found = self.stream.read(bound if count < 0 else min(count, bound))
        self.meter.spend(len(found))
        return found


def _decompressed(stream: IO[bytes], head: bytes) -> Any:
    import bz2
    import gzip
    import lzma

    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=stream, mode="rb")
    if head.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMAFile(stream)
    return bz2.BZ2File(stream) if head.startswith(b"BZh") else stream


def _unpack_tar(stream: IO[bytes], head: bytes, folder: Path, meter: Meter, archive: Path) -> None:
    packed = _decompressed(stream, head)
    if packed is stream and head[257:262] != b"ustar":
        raise ArtifactError(f"is neither a tar nor a zip archive: {cause_of(head) or 'unknown content'}", where=archive,
                            fix="Pack the folder with tar -czf")
    seen: set[str] = set()
    with tarfile.open(fileobj=Metered(packed, meter), mode="r|", bufsize=1 << 16,  # type: ignore[call-overload]
                      tarinfo=BoundedInfo) as tar:
        for member in tar:
            if member.isdir():
                continue
            _require_plain_member(member, archive)
            name = _plain_name(member.name, seen, archive)
            with tar.extractfile(member) as inner:
                _write(inner, folder / name)


def _require_plain_member(member: tarfile.TarInfo, archive: Path) -> None:
    kinds = ((member.issym(), "a symbolic link"), (member.islnk(), "a hard link"), (member.isdev(), "a device or FIFO"),
             (member.issparse(), "a sparse file"), (not member.isreg(), "something that is no file"),
             (bool(member.mode & 0o7000), "a file with setuid, setgid or sticky bit"))
    for wrong, what in kinds:
        if wrong:
            raise ArtifactError(f"holds {what}: {member.name[:80]!r}", where=archive, fix=REFUSED)


def _plain_name(name: str, seen: set[str], archive: Path) -> str:
    """A member's name without a leading "./", the first time it comes."""
    name = name.removeprefix("./")
    why = "" if name in (MANIFEST_NAME, SIGNATURE_NAME) else unusable_name(name)
    if why:
        raise ArtifactError(f"holds the name {name[:80]!r}, which {why}", where=archive, fix=REFUSED)
    if name.lower() in seen:
        raise ArtifactError(f"holds {name[:80]!r} twice", where=archive, fix=REFUSED)
    seen.add(name.lower())
    if len(seen) > MAX_DEVICE_FILES:
        raise ArtifactError("holds too many files", where=archive, expected=f"at most {MAX_DEVICE_FILES}", fix=REFUSED)
    return name


def _zip_entries(packed: zipfile.ZipFile, archive: Path) -> Iterator[Entry]:
    seen: set[str] = set()
    for info in packed.infolist():
        mode = info.external_attr >> 16
        if info.is_dir():
            continue
        if mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
            raise ArtifactError(f"holds a link or a device: {info.filename[:80]!r}", where=archive, fix=REFUSED)
        if mode & 0o7000:
            raise ArtifactError(f"holds a file with setuid, setgid or sticky bit: {info.filename[:80]!r}",
                                where=archive, fix=REFUSED)
        if info.flag_bits & 1:
            raise ArtifactError("is encrypted", where=archive, fix="Pack it without a password")
        name = _plain_name(info.orig_filename, seen, archive)
        yield Entry(name, lambda info=info: packed.open(info))  # type: ignore[misc]


def _write_all(entries: list[Entry], folder: Path, meter: Meter, archive: Path) -> None:
    for entry in entries:
        with entry.open() as inner:
            _write(inner, folder / entry.name, meter)


def _write(inner: IO[bytes], target: Path, meter: Meter | None = None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as stream:
        while chunk := inner.read(CHUNK):
            if meter is not None:
                meter.spend(len(chunk))
            stream.write(chunk)
