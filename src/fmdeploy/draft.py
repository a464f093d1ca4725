"""How an artifact comes to be: a scratch folder beside the target, sealed, fsynced and renamed once.

A stage that is killed leaves a hidden folder without a manifest: nothing that opens. A resumable stage
finds its own scratch folder again when stage, configuration and inputs are the same.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fmdeploy import interrupt
from fmdeploy.artifact import Artifact, entry_of, open_artifact, payload_files
from fmdeploy.config import StageConfig
from fmdeploy.environment import describe_environment
from fmdeploy.errors import ArtifactError, NoSpaceError
from fmdeploy.files import is_no_space
from fmdeploy.manifest import MANIFEST_NAME, SCHEMA_VERSION, Kind, Manifest, Parent, read_manifest, request_key
from fmdeploy.progress import say

KEY_NAME = ".key"
WORK_NAME = "work"
HEADSTART_S = 60.0  # in which the main process of several must have begun


class Draft:
    """An artifact in the making. Files under `work/` and dot files are dropped when it is sealed."""

    def __init__(self, root: Path, *, is_main: bool = True) -> None:
        self.root = root
        self.is_main = is_main
        self.notes: dict[str, Any] = {}

    def path(self, name: str) -> Path:
        """Path for the payload file `name`; its folders exist afterwards."""
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def write_text(self, name: str, text: str) -> None:
        """Write a UTF-8 file."""
        self.path(name).write_text(text, encoding="utf-8")

    def write_json(self, name: str, value: Any) -> None:
        """Write sorted, indented JSON; NaN is refused."""
        self.write_text(name, json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n")

    def write_tensors(self, name: str, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Write numpy arrays of any shape as safetensors."""
        from safetensors.numpy import save_file

        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, self.path(name))

    def note(self, **values: Any) -> None:
        """Add to the manifest's environment: what differs from run to run (seconds, machine)."""
        self.notes.update(values)


def produce(
    out: Path,
    kind: Kind,
    *,
    stage: str,
    config: StageConfig,
    inputs: Mapping[str, Artifact | Parent],
    build: Callable[[Draft], None],
    resumable: bool = False,
) -> Artifact:
    """Write one artifact to `out` with `build`, or return the identical one that is already there.

    Args:
        out: Target directory; must not exist, unless it holds the result of the very same request.
        kind: What is written.
        stage: Name of the stage, as in the manifest.
        config: Its configuration; `config.resolved()` goes into the manifest.
        inputs: Role → opened parent, or what a manifest says of it where only that is at hand.
        build: Fills the draft. Under `torchrun` every rank calls it; only `draft.is_main` writes common files.
        resumable: Keep the scratch folder when the stage is interrupted after it has written something.

    Raises:
        ArtifactError: something else is at `out`, or another process is writing it now.
        NoSpaceError: the disk is full; nothing that opens was left, checkpoints of a resumable stage are kept.
    """
    out = Path(os.path.abspath(out))
    if out == Path.cwd():
        raise ArtifactError("is the current folder, which cannot be replaced", where=out, fix="Name a new --out")
    parents = {role: found if isinstance(found, Parent) else found.parent() for role, found in sorted(inputs.items())}
    resolved = config.resolved()
    key = request_key(kind, stage, resolved, parents)
    if (done := _finished(out, kind, key)) is not None:
        say(f"{out} is up to date: same stage, configuration and inputs")
        return done
    if int(os.environ.get("RANK", "0")) > 0:
        return _follow(out, kind, key, build)
    return _lead(out, Manifest(kind=kind, schema_version=SCHEMA_VERSION, stage=stage, config=resolved, inputs=parents,
                               files={}, environment={}), key, build, resumable)


def _finished(out: Path, kind: Kind, key: str) -> Artifact | None:
    if not os.path.lexists(out):
        return None
    if not (out / MANIFEST_NAME).is_file():
        if out.is_dir() and not any(out.iterdir()):
            return None
        raise ArtifactError("already exists and is not an fmdeploy artifact", where=out, fix="Choose another --out")
    if read_manifest(out).key() != key:
        raise ArtifactError(
            "already holds another artifact (other stage, configuration or inputs)",
            where=out, fix="Choose another --out, or delete that folder",
        )
    return open_artifact(out, kind)


def _lead(
    out: Path, blank: Manifest, key: str, build: Callable[[Draft], None], resumable: bool
) -> Artifact:
    started = time.monotonic()
    scratch = _scratch(out)
    with _locked(scratch, out):
        if (done := _finished(out, blank.kind, key)) is not None:  # another process wrote it since we looked
            shutil.rmtree(scratch, ignore_errors=True)
            return done
        draft = Draft(scratch)
        try:
            _adopt(scratch, key, resumable)
            build(draft)
            _seal(draft, blank, out, round(time.monotonic() - started, 3))
        except BaseException as error:
            _abandon(scratch, out, error, resumable)
            raise
    return Artifact(out, read_manifest(out))


def _abandon(scratch: Path, out: Path, error: BaseException, resumable: bool) -> None:
    """Remove the scratch folder, unless it holds work that a second run can go on from.

    Raises:
        NoSpaceError: in place of whatever a full disk made of it.
    """
    if not (resumable and payload_files(scratch) - {KEY_NAME}):
        shutil.rmtree(scratch, ignore_errors=True)
    if is_no_space(error):
        raise NoSpaceError("the disk is full; nothing that opens was left behind", where=out.parent,
                           fix="Free some space and run the same command again") from error


def _scratch(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


@contextmanager
def _locked(scratch: Path, out: Path) -> Iterator[None]:
    """Hold the scratch folder's lock."""
    while (handle := _lock(scratch, out)) is None:
        continue
    try:
        yield
    finally:
        os.close(handle)


def _lock(scratch: Path, out: Path) -> int | None:
    """Lock the scratch folder; None when it was renamed or removed meanwhile and the lock is on something else."""
    try:
        scratch.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # the parents were made: a file system without folders of one's own, like /proc
        raise ArtifactError("cannot be made there", where=out, fix="Choose another --out") from error
    try:
        handle = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ArtifactError("is being written by another process", where=out, fix="Wait for it to end") from error
    if _is_same_folder(handle, scratch):
        return handle
    os.close(handle)
    return None


def _is_same_folder(handle: int, scratch: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(scratch))
    except FileNotFoundError:
        return False


def _adopt(scratch: Path, key: str, resumable: bool) -> None:
    """Keep a scratch folder that belongs to this very request; empty any other."""
    note = scratch / KEY_NAME
    if resumable and note.is_file() and note.read_text() == key:
        say("resuming an interrupted run")
        return
    for child in scratch.iterdir():
        shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    note.write_text(key)


def _seal(draft: Draft, blank: Manifest, out: Path, seconds: float) -> None:
    interrupt.check()
    names = sorted(name for name in payload_files(draft.root) if not _is_dropped(name))
    files = {name: entry_of(draft.root / name) for name in names}
    environment = {**describe_environment(), "seconds": seconds, **draft.notes}
    manifest = blank.model_copy(update={"files": files, "environment": environment})
    for name in names:
        os.chmod(draft.root / name, 0o644)  # safetensors makes its files private; a container has another user
        _fsync(draft.root / name)
    _drop_work(draft.root)  # only now: a kill before this line costs nothing but the hashing
    (draft.root / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    _fsync(draft.root / MANIFEST_NAME)
    for top, _, _ in os.walk(draft.root):
        _fsync(Path(top))
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    os.rename(draft.root, out)
    _fsync(out.parent)


def _is_dropped(name: str) -> bool:
    return name.startswith(f"{WORK_NAME}/") or Path(name).name.startswith(".")


def _drop_work(root: Path) -> None:
    shutil.rmtree(root / WORK_NAME, ignore_errors=True)
    for name in filter(_is_dropped, payload_files(root)):
        (root / name).unlink()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _follow(out: Path, kind: Kind, key: str, build: Callable[[Draft], None]) -> Artifact:
    """Ranks above 0 compute with the others and write only what `build` gives them to write."""
    build(Draft(_scratch(out), is_main=False))
    limit = time.monotonic() + HEADSTART_S
    while not _scratch(out).exists() and _finished(out, kind, key) is None and time.monotonic() < limit:
        time.sleep(0.1)  # what a rank has no part in is over before the main process has begun
    while _scratch(out).exists():  # the main process evaluates, hashes and renames
        time.sleep(0.1)
    if (found := _finished(out, kind, key)) is not None:
        return found
    raise ArtifactError("the main process did not finish the artifact", where=out)
