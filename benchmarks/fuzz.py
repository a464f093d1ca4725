"""Mutated manifests and ONNX files through the validator, and writers that are killed: `make fuzz`.

    python benchmarks/fuzz.py --count 10000 --kills 200

Every case runs in a child process that has nothing but a bundle to look at. Counted are crashes (a signal, or any
exception but a typed error), hangs (over 2 s), and attempts to write, to start a program or to open a connection, which
an audit hook sees whatever they are aimed at. What the validator lets through is then loaded by ONNX Runtime, in the
same child: a crash there would show as well. The second part kills writers of artifacts at random times and opens what
they left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import onnxruntime

from fmdeploy.artifact import open_artifact
from fmdeploy.draft import produce
from fmdeploy.errors import FmdeployError
from fmdeploy.manifest import Kind
from fmdeploy.runtime.bundle import open_bundle
from fmdeploy.runtime.onnxcheck.checks import check_model
from fmdeploy.runtime.onnxcheck.interface import Declared
from support.bundles import BundleConfig, fp32_model, int8_model, io_spec, make_bundle

HANG_S = 2.0
BAD = ("crashes", "hangs", "forbidden_acts", "files_outside", "torn_loads")
BATCH = 500
REFUSED, ACCEPTED, UNTYPED, REFUSED_LATER = range(4)
RECORD = struct.Struct("<IBB")  # case, outcome, forbidden acts so far
ODD: tuple[Any, ...] = (None, -1, 0, 2**63, 10**30, 1.5, True, "", "x" * 300, "../x", "/etc/passwd", "\x00", [], {},
                        [[]], {"a": {"b": {}}}, "0" * 64, "BUNDLE", "é", "\n", 1e308)
WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod",
          "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "shutil.rmtree", "os.fork"}


def mutated_bytes(raw: bytes, rng: random.Random) -> bytes:
    """A few changes anywhere: bits, bytes, cuts, copies, numbers of extreme size."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(out)) if out else 0
        length = rng.choice((1, 1, 2, 8, 64))
        how = rng.randrange(8)
        if how == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif how == 1 and out:
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif how == 2:
            del out[at : at + length]
        elif how == 3:
            out[at:at] = rng.randbytes(length)
        elif how == 4:
            out[at:at] = out[at : at + length]
        elif how == 5:
            out = out[:at]
        elif how == 6:
            out[at : at + 10] = b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"
        else:
            other = rng.randrange(len(out)) if out else 0
            out[at : at + length] = out[other : other + length]
    return bytes(out)


def mutated_manifest(raw: bytes, rng: random.Random) -> bytes:
    """Bytes changed, or keys and values changed and sealed again, so that the rules behind the seal are reached."""
    if rng.random() < 0.4:
        return mutated_bytes(raw, rng)
    body = json.loads(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        spot: Any = body
        while isinstance(spot, (dict, list)) and spot and rng.random() < 0.75:
            key = rng.choice(list(spot) if isinstance(spot, dict) else range(len(spot)))
            if not isinstance(spot[key], (dict, list)) or not spot[key]:
                break
            spot = spot[key]
        if isinstance(spot, dict):
            _change_object(spot, rng)
    body.pop("seal", None)
    try:
        seal = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    except (TypeError, ValueError):
        seal = "0" * 64
    return json.dumps({**body, "seal": seal}, indent=rng.choice((None, 1))).encode()


def _change_object(spot: dict[str, Any], rng: random.Random) -> None:
    key = rng.choice(list(spot) or ["x"])
    how = rng.randrange(4)
    if how == 0:
        spot.pop(key, None)
    elif how == 1:
        spot[rng.choice(("x", "../y", "a/b", "", "\x1b[2J", "kind", "files"))] = spot.get(key)
    else:
        spot[key] = rng.choice(ODD)


class Cases:
    """The inputs, by number: even ones are manifests, odd ones ONNX files."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed = seed
        self.bundle = make_bundle(folder / "bundle", width=2).root
        self.manifest = (self.bundle / "manifest.json").read_bytes()
        self.models = (("fp32", fp32_model(width=2)), ("int8-cpu", int8_model(width=2)))
        self.forbidden = 0
        self.watching = False

    def run(self, number: int) -> int:
        """Validate one case."""
        rng = random.Random(f"{self.seed} {number}")
        if number % 2 == 0:
            raw = mutated_manifest(self.manifest, rng)
            (self.bundle / "manifest.json").write_bytes(raw)
            return self._watched(self._open)
        variant, raw = self.models[rng.randrange(2)]
        return self._watched(lambda: self._model(mutated_bytes(raw, rng), variant))

    def _open(self) -> int:
        open_bundle(self.bundle)
        return ACCEPTED

    def _watched(self, act: Callable[[], int]) -> int:
        self.watching = True
        try:
            return act()
        except FmdeployError as error:
            return REFUSED if error.exit_code == 2 and "\n" not in str(error) else UNTYPED
        except Exception as error:
            print(f"untyped: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            return UNTYPED
        finally:
            self.watching = False

    def _model(self, raw: bytes, variant: str) -> int:
        check_model(raw, io_spec(), where="model.onnx", declared=Declared(variant.startswith("int8")))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        try:
            onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
        except Exception:
            return REFUSED_LATER
        return ACCEPTED

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count what a validator has no business to do."""
        if not self.watching:
            return
        flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
        self.forbidden += bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or event in WRITES


class Planted(Cases):
    """Positive control: one case each of what is counted."""

    def run(self, number: int) -> int:
        """Misbehave."""
        if number == 0:
            os.abort()
        while number == 1:
            time.sleep(60)
        return self._watched(self._write if number == 2 else self._raise)

    def _write(self) -> int:
        (self.bundle.parent / "outside").write_bytes(b"x")
        return ACCEPTED

    def _raise(self) -> int:
        raise KeyError("planted")


def child(cases: Cases, numbers: range, pipe: int) -> None:
    """Run cases one by one; a record before and after each."""
    sys.addaudithook(cases.audit)
    for number in numbers:
        os.write(pipe, RECORD.pack(number, 255, 0))
        outcome = cases.run(number)
        os.write(pipe, RECORD.pack(number, outcome, min(255, cases.forbidden)))


def fuzz(folder: Path, count: int, seed: int, kind: type[Cases] = Cases) -> dict[str, Any]:
    """Run all cases and count."""
    cases, found = kind(folder, seed), Counter[str]()
    worst_s, next_number = 0.0, 0
    while next_number < count:
        numbers = range(next_number, min(count, next_number + BATCH))
        reached, took = _batch(cases, numbers, found)
        next_number, worst_s = reached + 1, max(worst_s, took)
    outside = sorted(p.name for p in folder.iterdir() if p.name != "bundle")
    return {"cases": count, "seed": seed, "refused": found["refused"], "accepted": found["accepted"],
            "refused_by_onnxruntime_only": found["refused later"], "crashes": found["crash"] + found["untyped"],
            "hangs": found["hang"], "forbidden_acts": found["forbidden"], "files_outside": len(outside),
            "slowest_ms": round(1e3 * worst_s, 1)}


def _batch(cases: Cases, numbers: range, found: Counter[str]) -> tuple[int, float]:
    """Run a range of cases in one child; the last case reached, and the slowest of them in seconds."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        child(cases, numbers, writer)
        os._exit(0)
    os.close(writer)
    at, started, worst_s, forbidden = numbers.start, time.monotonic(), 0.0, 0
    names = {REFUSED: "refused", ACCEPTED: "accepted", UNTYPED: "untyped", REFUSED_LATER: "refused later"}
    with os.fdopen(reader, "rb", buffering=0) as stream:
        while True:
            if not select.select([stream], [], [], HANG_S)[0]:
                if is_only_waiting_for_a_core(process) and time.monotonic() - started < 30:
                    continue
                found["hang"] += 1
                print(f"case {at}: hangs", file=sys.stderr)
                os.kill(process, signal.SIGKILL)
                break
            raw = stream.read(RECORD.size)
            if not raw:
                break
            at, outcome, forbidden = RECORD.unpack(raw)
            if outcome == 255:
                started = time.monotonic()
            else:
                found[names[outcome]] += 1
                worst_s = max(worst_s, time.monotonic() - started)
    status = os.waitpid(process, 0)[1]
    if status and not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        found["crash"] += 1
        print(f"case {at}: the child ended with status {status}", file=sys.stderr)
    found["forbidden"] += forbidden
    return (at if status else numbers.stop - 1), worst_s


def is_only_waiting_for_a_core(process: int) -> bool:
    """Whether a silent child is runnable and has not had 2 s of a core: a busy machine, not a hang.

    A child that sleeps, as on a FIFO, hangs; its time so far includes the cases before, so few are forgiven.
    """
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    state, ticks = fields[0], int(fields[11]) + int(fields[12])
    time.sleep(HANG_S)
    later = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    used_s = (int(later[11]) + int(later[12]) - ticks) / os.sysconf("SC_CLK_TCK")
    return state in "RD" and used_s < 0.9 * HANG_S


def write_for_ever(folder: Path) -> None:
    """Write one artifact after another, of several files, until killed."""
    number = 0
    while True:
        raw = struct.pack("<I", number)

        def build(draft: Any, raw: bytes = raw) -> None:
            for part in range(4):
                draft.path(f"part{part}.bin").write_bytes(raw * 2000)

        target = folder / "current"
        if target.exists():  # replace it as a deployment would: write beside, rename
            produce(folder / "next", Kind.BUNDLE, stage="s", config=BundleConfig(label=str(number)), inputs={},
                    build=build)
            shutil.rmtree(folder / "old", ignore_errors=True)
            os.rename(target, folder / "old")
            os.rename(folder / "next", target)
        else:
            produce(target, Kind.BUNDLE, stage="s", config=BundleConfig(label=str(number)), inputs={}, build=build)
        number += 1


def kill_writers(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill a writer `kills` times at random moments; open every folder it left under a name that is not hidden."""
    rng, torn, whole, unfinished = random.Random(seed), 0, 0, 0
    for _ in range(kills):
        process = os.fork()
        if process == 0:
            with open(os.devnull, "w") as sink:
                os.dup2(sink.fileno(), 2)
                write_for_ever(folder)
            os._exit(1)
        time.sleep(rng.uniform(0.002, 0.1))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        for path in folder.iterdir():
            try:
                artifact = open_artifact(path)
                parts = {artifact.read(f"part{part}.bin")[:4] for part in range(4)}
                whole, torn = whole + 1, torn + (len(parts) != 1)
            except FmdeployError:
                # A hidden folder is a write that was killed, `old` one that was being removed: neither may open, but
                # the name that is loaded must.
                unfinished += path.name.startswith(".") or path.name == "old"
                torn += not (path.name.startswith(".") or path.name == "old")
        shutil.rmtree(folder / "next", ignore_errors=True)  # the next start cleans up
    return {"kills": kills, "seed": seed, "torn_loads": torn, "whole_loads": whole, "unfinished_refused": unfinished}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--planted", action="store_true", help="only prove that crashes, hangs and writes are counted")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fmdeploy-fuzz-") as name:
        if options.planted:
            found = {"planted": timed(lambda: fuzz(Path(name), 4, 0, Planted))}
        else:
            for part in ("validator", "writers"):
                Path(name, part).mkdir()
            found = {"validator": timed(lambda: fuzz(Path(name, "validator"), options.count, options.seed)),
                     "writers": timed(lambda: kill_writers(Path(name, "writers"), options.kills, options.seed))}
        print(json.dumps(found))
    sys.exit(any(part.get(count, 0) for part in found.values() for count in BAD))


def timed(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` found, and how long it took."""
    started = time.monotonic()
    return {**run(), "seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    main()
