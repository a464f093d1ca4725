"""Kills writers of a ring at random moments and looks at what they left. Prints what it found as JSON.

    python ring_killer.py KILLS

A process of its own: it forks, which the test's process with its threads must not do.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
import time

import numpy as np

from fmdeploy.iospec import TensorSpec
from fmdeploy.runtime.supervisor.ring import Ring

SPECS = (TensorSpec(name="a", shape=(64, 1024)), TensorSpec(name="b", shape=(3, 1000)))
SLOTS = 4


def write_for_ever(ring: Ring) -> None:
    seq, arrays = 0, {spec.name: np.empty(spec.shape, np.float32) for spec in SPECS}
    while True:
        seq += 1
        for array in arrays.values():
            array.fill(seq)
        ring.write(seq, seq, arrays, str(seq).encode())


def main(kills: int) -> None:
    rng, found = random.Random(1), dict.fromkeys(("kills", "torn", "unfinished", "mixed_without_marks", "whole"), 0)
    for _ in range(kills):
        memory = mmap.mmap(-1, Ring.size_of(SPECS, SLOTS))
        ring = Ring(memory, SPECS, SLOTS)
        child = os.fork()
        if child == 0:
            write_for_ever(ring)
        while ring._words[0][1] == 0:  # until every slot was written once
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.004))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found["kills"] += 1
        look(ring, found)
    print(json.dumps(found))


def look(ring: Ring, found: dict[str, int]) -> None:
    for at in range(SLOTS):
        begun, done = (int(word) for word in ring._words[at][:2])
        found["unfinished"] += begun != done
        views = ring._views[at]
        mixed = len({float(value) for view in views.values() for value in (view.flat[0], view.flat[-1])}) > 1
        found["mixed_without_marks"] += mixed
        for word in {begun, done} - {0}:
            slot = ring.read(word - 1)
            if slot is None:
                continue
            values = {float(value) for array in slot.arrays.values() for value in np.unique(array)}
            whole = values == {float(slot.seq)} and slot.notes == str(slot.seq).encode() and slot.stamp_ns == slot.seq
            found["whole" if whole else "torn"] += 1


if __name__ == "__main__":
    main(int(sys.argv[1]))
