"""What travels beside the tensors: packets on the socket and the notes of a slot, as a few bytes or compact JSON."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fmdeploy.arrays import Arrays
from fmdeploy.runtime.frame import Finding, Reason
from fmdeploy.runtime.guards.config import GuardConfig
from fmdeploy.runtime.inference import Result
from fmdeploy.runtime.loading import Terms
from fmdeploy.runtime.supervisor.ring import NOTES_BYTES

# First byte of a packet. From the parent: SETUP, RUN, ASK, STOP; from the worker: READY, FAILED, DONE, ANSWER.
SETUP, RUN, ASK, STOP, READY, FAILED, DONE, ANSWER = (bytes([code]) for code in range(8))
TERMS = ("engines", "build_missing", "target", "floor_mib", "build_command")
NUMBER = struct.Struct("<cQ")
USUAL = struct.Struct("=HH")  # bytes of the head, number of scores
UNUSUAL = b"\xff\xff"  # in the place of the length of a head
DETAILS = ((400, 24), (60, 24), (0, 24))  # characters of a detail and number of findings that a slot has room for


@dataclass(frozen=True)
class Setup:
    """What a worker is told before it loads anything.

    Attributes:
        bundle: Folder of the bundle.
        digest: Digest that it must have: what the parent verified is what the worker runs.
        tiers: Tiers to admit, best first.
        threads: Threads inside one run.
        guards: Which guards run.
        beat_ms: Longest time between two heartbeats of an idle worker.
        terminate_ms: Time after which a run is asked to end; 0: never.
        address_space_mib: Limit on the worker's address space; 0: none.
        terms: On which terms tiers are admitted; a worker looks at the machine it runs on.
    """

    bundle: str
    digest: str
    tiers: tuple[str, ...]
    threads: int
    guards: GuardConfig
    beat_ms: float
    terminate_ms: float
    address_space_mib: int = 0
    terms: Terms = field(default_factory=Terms)

    def encode(self) -> bytes:
        """Return the packet."""
        facts = {**self.__dict__, "guards": asdict(self.guards)}
        facts["terms"] = {name: getattr(self.terms, name) for name in TERMS}
        return SETUP + json.dumps(facts, default=str).encode()

    @classmethod
    def decode(cls, packet: bytes) -> Setup:
        """Read the packet back."""
        found = json.loads(packet[1:])
        terms = found["terms"]
        terms["engines"] = None if terms["engines"] is None else Path(terms["engines"])
        terms["build_command"] = None if terms["build_command"] is None else tuple(terms["build_command"])
        typed = {"tiers": tuple(found["tiers"]), "guards": GuardConfig(**found["guards"]), "terms": Terms(**terms)}
        return cls(**{**found, **typed})


def number(kind: bytes, seq: int) -> bytes:
    """A packet about one frame."""
    return NUMBER.pack(kind, seq)


def text(kind: bytes, value: Any) -> bytes:
    """A packet with anything JSON can say."""
    return kind + json.dumps(value, separators=(",", ":")).encode()


def encode_request(missing: Collection[str], refused: bool) -> bytes:
    """Notes beside a frame's inputs; none for the usual frame."""
    return json.dumps([refused, sorted(missing)]).encode() if missing or refused else b""


def decode_request(notes: bytes) -> tuple[bool, tuple[str, ...]]:
    """Return refused and missing."""
    if not notes:
        return False, ()
    refused, missing = json.loads(notes)
    return bool(refused), tuple(missing)


def encode_result(result: Result) -> bytes:
    """Notes beside a frame's outputs: for the usual frame a head that repeats, and its scores as plain numbers."""
    if not result.findings and not result.innocent:
        head, scores = _head(result.tier, result.model, result.provider, tuple(result.scores))
        return head + scores.pack(*result.scores.values())
    return UNUSUAL + _encode_all(result)


def decode_result(notes: bytes, outputs: Arrays) -> Result:
    """Read a result back."""
    if notes.startswith(UNUSUAL):
        return _decode_all(notes[len(UNUSUAL) :], outputs)
    start = USUAL.size + USUAL.unpack_from(notes)[0]
    tier, model, provider, names, scores = _names(notes[:start])
    values = scores.unpack_from(notes, start)
    return Result(outputs, (), tier, model, provider, dict(zip(names, values, strict=True)))


@functools.lru_cache(64)
def _head(tier: str, model: str, provider: str, names: tuple[str, ...]) -> tuple[bytes, struct.Struct]:
    """What comes before the scores, and how they are packed."""
    head = json.dumps((tier, model, provider, names)).encode()
    return USUAL.pack(len(head), len(names)) + head, struct.Struct(f"={len(names)}d")


@functools.lru_cache(64)
def _names(head: bytes) -> tuple[str, str, str, tuple[str, ...], struct.Struct]:
    """Tier, model, provider, names of the scores, and how they are packed."""
    tier, model, provider, names = json.loads(head[USUAL.size :])
    return tier, model, provider, tuple(names), struct.Struct(f"={len(names)}d")


def _encode_all(result: Result) -> bytes:
    for chars, count in DETAILS:
        findings = [(code.value, detail[:chars]) for code, detail in result.findings[:count]]
        scores = result.scores if chars else {}
        values = findings, result.tier, result.model, result.provider, scores, result.innocent
        packed = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
        if len(UNUSUAL) + len(packed) <= NOTES_BYTES:
            break
    return packed


def _decode_all(notes: bytes, outputs: Arrays) -> Result:
    findings, tier, model, provider, scores, innocent = json.loads(notes)
    found = tuple(Finding(Reason(code), detail) for code, detail in findings)
    return Result(outputs, found, tier, model, provider, scores, innocent)
