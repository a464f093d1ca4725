"""Files of finished FEATURES that another one needs too: linked, not computed again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.manifest import Kind
from fmdeploy.teacher.caching.index import Address, basis_name, read_index, shard_name


class Shelf:
    """Verified FEATURES to take shards from. Equal address, equal bytes: nothing else has to match.

    Args:
        roots: Their folders; a part (`--shard`) will do.

    Raises:
        ArtifactError: one of them does not open.
    """

    def __init__(self, roots: Iterable[Path] = ()) -> None:
        self.taken = 0
        self._holders: dict[str, list[Artifact]] = {}
        for artifact in (open_artifact(root, Kind.FEATURES) for root in roots):
            for cache in read_index(artifact).caches:
                self._holders.setdefault(cache.address.key, []).append(artifact)

    def take(self, target: Path, address: Address, number: int) -> bool:
        """Put one shard at `target` if any of them holds it."""
        return self._take(target, address.key, shard_name(address.key, number))

    def take_basis(self, target: Path, address: Address) -> bool:
        """Put the components of a PCA at `target` if any of them holds them."""
        return self._take(target, address.key, basis_name(address.key))

    def _take(self, target: Path, key: str, name: str) -> bool:
        for artifact in self._holders.get(key, ()):
            if artifact.has(name):
                link_or_copy(artifact.path(name), target)
                self.taken += 1
                return True
        return False


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for the file where the file system allows it, else a copy; complete or absent either way."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    unfinished.unlink(missing_ok=True)
    try:
        os.link(source, unfinished)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, unfinished)
    os.replace(unfinished, target)
