"""A stream of which every fifth frame is faulty, in the manner of Triton's stress test: no frame is published wrongly.

The long version is `make soak`.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fmdeploy.errors import FrameError
from fmdeploy.runtime.frame import Frame, Reason
from fmdeploy.runtime.state import Policy
from fmdeploy.runtime.supervisor.restarts import Pauses
from fmdeploy.runtime.supervisor.supervised import SupervisedRuntime
from support.runtimes import frame
from support.supervised import fresh, is_right, poisoned, supervised, wait_for

FRAMES, SEEDS = 300, 40
# What goes wrong, how often, and what the frame must say of it.
MIX = {
    "nan input": (30, Reason.NOT_FINITE),
    "range": (10, Reason.OUT_OF_RANGE),
    "shape": (15, None),
    "stale": (10, Reason.STALE),
    "raise": (12, Reason.BACKEND_ERROR),
    "nan": (10, Reason.NOT_FINITE_OUTPUT),
    "abort": (4, Reason.WORKER_LOST),
    "segv": (2, Reason.WORKER_LOST),
    "c_sleep": (3, Reason.WORKER_LOST),
}


def faulty_frame(runtime: SupervisedRuntime, fault: str, seed: int) -> Frame | None:
    """Feed one faulty frame; None where its structure was refused."""
    inputs, stamp = frame(seed), None
    if fault == "nan input":
        inputs["camera"][3, 2, 1] = np.nan
    elif fault == "range":
        inputs["lidar"][0, 1, 2] = 1.5
    elif fault == "shape":
        inputs["lidar"] = inputs["lidar"][:, :, :-1]
    elif fault == "stale":
        stamp = time.monotonic_ns() - 30_000_000_000
    else:
        inputs = poisoned(fault, seed)
    if fault == "shape":
        with pytest.raises(FrameError):
            runtime.infer(inputs)
        return None
    return runtime.infer(inputs, stamp_ns=stamp, deadline_ms=20_000.0)


def test_no_frame_is_published_wrongly(tmp_path: Path) -> None:
    rng, counts, valid, wrong = random.Random(5), Counter[str](), 0, 0
    policy = Policy(max_restarts=1000, backend_errors=1000, bad_in_a_row=1000)
    with supervised(tmp_path, hard_deadline_ms=400.0, policy=policy, pauses=Pauses(next_ms=0.0)) as runtime:
        for number in range(FRAMES):
            assert runtime.wait_ready(30.0)
            seed = rng.randrange(SEEDS)
            if number % 5 != 4:
                found = runtime.infer(frame(seed))
                assert found.valid or Reason.WORKER_LOST in found.reasons, found.record()
                valid += found.valid
                wrong += found.valid and not is_right(found, seed)
                continue
            fault = rng.choices(list(MIX), [weight for weight, _ in MIX.values()])[0]
            counts[fault] += 1
            bad = faulty_frame(runtime, fault, seed)
            if bad is not None:
                wrong += bad.valid or bool(bad.outputs)
                assert MIX[fault][1] in bad.reasons, (fault, bad.record())
        assert wrong == 0
        assert valid > 0.95 * FRAMES * 4 / 5
        assert wait_for(lambda: runtime.infer(fresh()).valid)
        losses = runtime.health().counters["losses"]
    print(f"{FRAMES} frames, {valid} valid, {wrong} wrong, {losses} workers lost, faults {dict(counts)}")
    assert losses >= counts["abort"] + counts["c_sleep"] + counts["segv"] > 0
