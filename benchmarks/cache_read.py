"""Random reads of a feature cache against np.memmap and WebDataset.

    python benchmarks/cache_read.py [--records N] [--rounds N] [--encoding float16|int8]

Records of 197 kB as float16: maps (384, 16, 16). The arms read batches of 16 random records in turn, in one process and
with one thread, from a warm page cache:

    cache          CacheReader.batch: gather from the shards' maps, decode
    cache again    the same (the A/A control)
    memmap         one np.memmap of the stored bytes, indexed; int8 is decoded by the same encoding
    memmap fp16    one np.memmap of float16 records: what int8 is up against when only speed counts
    webdataset     the same records in tar files, decoded too; streamed, since `webdataset` cannot read at random

Ratios are records per second of CPU time of this thread, from medians. Targets: cache / memmap ≥ 0.8, cache /
webdataset ≥ 10.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmdeploy.arrays import Array
from fmdeploy.teacher.caching.index import Address, Cache, Stored
from fmdeploy.teacher.caching.shardfile import map_safetensors, write_shard
from fmdeploy.teacher.encodings.base import Encoding, stored_name
from fmdeploy.teacher.encodings.registry import make, read_feature
from fmdeploy.teacher.features import CacheReader

SHAPE = (384, 16, 16)
NAME = "feature.tokens"
PER_SHARD = 128
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--encoding", choices=["float16", "int8"], action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for encoding in options.encoding or ("float16", "int8"):
        with tempfile.TemporaryDirectory() as name:
            report(encoding, measure(arms(Path(name), encoding, options.records), options.records, options.rounds))


def arms(home: Path, text: str, records: int) -> dict[str, Callable[[Array], object]]:
    """What is called with the numbers of one batch."""
    encoding, plain = (make(NAME, read_feature(kind), SHAPE, is_feature=True) for kind in (text, "float16"))
    rng = np.random.default_rng(0)
    shards, flat, half = [], defaultdict[str, list[Array]](list), []
    for number in range(records // PER_SHARD):
        value = rng.standard_normal((PER_SHARD, *SHAPE), np.float32)
        parts = encoding.encode(value)
        path = home / f"{number}.safetensors"
        write_shard(path, {stored_name(NAME, part): array for part, array in parts.items()}, {})
        shards.append(map_safetensors(path))
        for part, array in parts.items():
            flat[part].append(array)
        half.append(plain.encode(value)[""])
        _write_tar(home / f"{number}.tar", parts, number * PER_SHARD)
    address = Address(teacher="", data="", split="train", samples="", preprocessing="", layers=(), encoding=text,
                      logits={}, precision="fp32", batch=1, per_shard=PER_SHARD)
    cache = Cache(address=address, num_samples=records, arrays={NAME: Stored(shape=SHAPE, encoding=text)})
    reader = CacheReader(cache, {NAME: encoding}, shards)
    maps = {part: _memmap(home / f"{part or 'main'}.raw", np.concatenate(found)) for part, found in flat.items()}
    half_map = _memmap(home / "half.raw", np.concatenate(half))
    return {
        "cache": reader.batch, "cache again": reader.batch,
        "memmap": lambda index: encoding.decode({part: array[index] for part, array in maps.items()}),
        "memmap fp16": lambda index: half_map[index],
        "webdataset": _stream([str(home / f"{number}.tar") for number in range(records // PER_SHARD)], encoding),
    }


def _memmap(path: Path, array: Array) -> Any:
    array.tofile(path)
    return np.memmap(path, array.dtype, "r", shape=array.shape)


def _write_tar(path: Path, parts: dict[str, Array], first: int) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in range(PER_SHARD):
            for part, array in parts.items():
                buffer = io.BytesIO()
                np.save(buffer, array[row])
                info = tarfile.TarInfo(f"{first + row:08d}.{part or 'main'}.npy")
                info.size = buffer.tell()
                tar.addfile(info, io.BytesIO(buffer.getvalue()))


def _stream(names: list[str], encoding: Encoding) -> Callable[[Array], object]:
    """The next batch of an endless stream, whatever the index says, decoded by the same encoding."""
    import webdataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = iter(webdataset.WebDataset(names, shardshuffle=False, empty_check=False).decode().repeat())

    def take(index: Array) -> object:
        rows = [next(found) for _ in index]
        return encoding.decode({part: np.stack([row[f"{part or 'main'}.npy"] for row in rows])
                                for part in encoding.parts()})

    return take


def measure(calls: dict[str, Callable[[Array], object]], records: int, rounds: int) -> dict[str, Array]:
    """CPU seconds of each batch (rounds,), the arms taking turns."""
    found: dict[str, list[float]] = defaultdict(list)
    rng, names = np.random.default_rng(1), list(calls)
    for number in range(rounds + 10):
        for name in rng.permutation(names):  # nobody always follows the one that empties the processor's caches
            index, call = rng.integers(0, records, BATCH), calls[name]
            started = time.thread_time()
            call(index)
            if number >= 10:
                found[name].append(time.thread_time() - started)
    return {name: np.asarray(row) for name, row in found.items()}


def report(encoding: str, times: dict[str, Array]) -> None:
    speed = {name: BATCH / float(np.median(row)) for name, row in times.items()}
    print(f"{encoding}, batch {BATCH}, records of {np.prod(SHAPE) * 2 / 1000:.0f} kB as float16")
    for name, value in speed.items():
        print(f"  {name:12} {value:9.0f} records/s")
    for title, one, other, target in (("control (A/A)", "cache again", "cache", ""),
                                      ("cache / memmap", "cache", "memmap", "(target ≥ 0.8)"),
                                      ("cache / memmap fp16", "cache", "memmap fp16", ""),
                                      ("cache / webdataset", "cache", "webdataset", "(target ≥ 10)")):
        print(f"  {title:20} {speed[one] / speed[other]:6.2f} {target}")


if __name__ == "__main__":
    main()
