"""The worker process: `python -m fmdeploy.runtime.supervisor.worker MEMORY SOCKET LIFELINE`, descriptors inherited.

One loop: take a packet, do it, say so. The heartbeat is written by this loop and by nothing else, so a worker that
hangs in a run, is stopped, or spins in a library looks exactly as dead as it is.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from fmdeploy.errors import ArtifactError, FmdeployError
from fmdeploy.runtime.bundle import Bundle, open_bundle
from fmdeploy.runtime.frame import Reason
from fmdeploy.runtime.inference import Inference, Result
from fmdeploy.runtime.supervisor import notes
from fmdeploy.runtime.supervisor.channel import Channel, tie_to_parent
from fmdeploy.runtime.supervisor.limit import RunLimit
from fmdeploy.runtime.supervisor.notes import Setup

MAX_PACKET = 1 << 16
DEVICE_LOST_EXIT = 75  # the device fails every call: only a new process can help (EX_TEMPFAIL)
MIB = 1 << 20

MakeInference = Callable[[Setup, Bundle], Inference]


class Worker:
    """Frames in, results out, until the parent hangs up."""

    def __init__(self, channel: Channel, inference: Inference, setup: Setup) -> None:
        self.channel, self.inference = channel, inference
        # The parent writes a slot again only after it has the answer, or this process is dead: no copy is needed.
        inference.guards.trust(channel.frames.arrays())
        self._completed = 0
        self._limit = RunLimit(self._terminate, setup.terminate_ms) if setup.terminate_ms else None
        seconds = setup.beat_ms / 1000
        wait = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
        channel.doorbell.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)

    def serve(self) -> None:
        """Answer packets until the parent says stop or is gone."""
        while True:
            try:
                packet = self.channel.doorbell.recv(MAX_PACKET)
            except BlockingIOError:  # nothing to do for one beat
                self.channel.beat()
                continue
            kind = packet[:1]
            if kind == notes.RUN:
                self._run(notes.NUMBER.unpack(packet)[1])
            elif kind == notes.ASK:
                self._answer(json.loads(packet[1:]))
            else:  # STOP, or empty: the parent is gone
                return

    def _run(self, seq: int) -> None:
        channel = self.channel
        channel.beat(busy=seq)
        slot = channel.frames.peek(seq)
        if slot is None:
            raise FmdeployError("was told of a frame that is not in its slot", where=f"frame {seq}")
        refused, missing = notes.decode_request(slot.notes)
        if self._limit is not None:
            self._limit.begin()
        result = self.inference.run(slot.arrays, missing=missing, refused=refused)
        if self._limit is not None:
            self._limit.end()
        channel.results.write(seq, slot.stamp_ns, result.outputs, notes.encode_result(result))
        self._completed += 1
        channel.beat(completed=self._completed)
        channel.doorbell.send(notes.number(notes.DONE, seq))
        if _device_lost(result):
            os._exit(DEVICE_LOST_EXIT)  # no destructors: they would wait for the device

    def _terminate(self) -> None:
        terminate = getattr(self.inference.backend, "terminate", None)
        if terminate is not None:
            terminate()

    def _answer(self, question: dict[str, Any]) -> None:
        """Do what is not a frame: so far only the self-test."""
        self.channel.beat(busy=0)
        try:
            answer: dict[str, Any] = {"report": self.inference.self_test(question.get("sample")).to_json()}
        except FmdeployError as error:
            answer = {"error": str(error)}
        self._completed += 1
        self.channel.beat(completed=self._completed)
        self.channel.doorbell.send(notes.text(notes.ANSWER, answer))


def identity(inference: Inference) -> dict[str, Any]:
    """What a worker says of itself: what it runs, and what it found."""
    _, tier, model, provider = inference.running
    return {
        "tier": tier,
        "provider": provider,
        "model": model,
        "reports": [report.to_json() for report in inference.reports],
    }


def make_inference(setup: Setup, bundle: Bundle) -> Inference:
    """Load and admit the tiers of this worker."""
    # The guards copy each frame out of the ring once. Read in place it takes longer: a model reads its input several
    # times, and shared memory that another core wrote is slower than the copy.
    return Inference(bundle, tiers=setup.tiers, threads=setup.threads, guards=setup.guards, terms=setup.terms)


def load(setup: Setup, make: MakeInference) -> Inference:
    """Open the bundle that the parent verified, and no other, and admit its tiers."""
    if setup.address_space_mib:
        resource.setrlimit(resource.RLIMIT_AS, (setup.address_space_mib * MIB,) * 2)
    bundle = open_bundle(setup.bundle)
    if bundle.digest != setup.digest:
        raise ArtifactError("was replaced after the supervisor had verified it", where=setup.bundle,
                            expected=setup.digest, found=bundle.digest)
    return make(setup, bundle)


def main(arguments: list[str], make: MakeInference = make_inference) -> NoReturn:
    """Load, tell that it is ready, serve, exit. Ctrl-C and SIGTERM are the parent's business."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGIO})
    # A dump of the memory would hold the socket open: the parent would learn of a crash a second late.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    memory, doorbell_fd, lifeline = map(int, arguments)
    tie_to_parent(lifeline)
    doorbell = socket.socket(fileno=doorbell_fd)
    setup = Setup.decode(doorbell.recv(MAX_PACKET))
    try:
        inference = load(setup, make)
        channel = Channel(inference.bundle.io, memory, doorbell)
        worker = Worker(channel, inference, setup)
        channel.beat(completed=0)
        doorbell.send(notes.text(notes.READY, identity(inference)))
        worker.serve()
    except FmdeployError as error:
        doorbell.send(notes.text(notes.FAILED, {"error": str(error), "kind": type(error).__name__}))
        sys.stdout.flush()
        os._exit(error.exit_code)
    except (BrokenPipeError, ConnectionResetError):  # the parent died while it was told something
        os._exit(0)
    os._exit(0)  # at once: nothing here needs a destructor, and a backend's may hang


def _device_lost(result: Result) -> bool:
    return any(finding.code is Reason.DEVICE_LOST for finding in result.findings)


if __name__ == "__main__":
    main(sys.argv[1:])
