"""A root file system as an image that `docker load` reads, with its true architecture.

`docker import --platform` of engine 20.10 labels every image with the engine's own architecture.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import BinaryIO


def write_archive(layer: Path, arch: str, tag: str, out: BinaryIO) -> None:
    """Write one layer, its configuration and the manifest."""
    digest = hashlib.sha256(layer.read_bytes()).hexdigest()
    config = json.dumps({"architecture": arch, "os": "linux", "config": {"Cmd": ["/bin/sh"]},
                         "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
                         "history": [{"created_by": "debootstrap"}]}).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [tag], "Layers": ["layer.tar"]}]).encode()
    with tarfile.open(fileobj=out, mode="w|") as archive:
        for name, content in (("config.json", config), ("manifest.json", manifest)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        archive.add(layer, "layer.tar")


if __name__ == "__main__":
    write_archive(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.stdout.buffer)
