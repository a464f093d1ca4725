"""What a frame carries, and whose memory it is."""

from __future__ import annotations

from typing import Any

import numpy as np

from fmdeploy.runtime import Reason, open_bundle
from support.bundles import Arrays
from support.runtimes import frame, runtime, toy_bundle


def test_outputs_belong_to_the_caller() -> None:
    target = runtime()
    first = target.infer(frame(1)).outputs["bev"]
    kept = first.copy()
    target.infer(frame(2))
    assert np.array_equal(first, kept)


def test_output_that_is_not_finite() -> None:
    target = runtime()
    run = target.backend.run

    def broken(feeds: Arrays) -> Any:
        outputs = [array.copy() for array in run(feeds)]
        outputs[0][0, 0, 0, 0] = np.nan
        return outputs

    target.backend.run = broken  # type: ignore[method-assign]
    found = target.infer(frame())
    assert found.reasons == (Reason.NOT_FINITE_OUTPUT,)
    assert found.outputs == {}


def test_every_frame_says_who_made_it() -> None:
    target = runtime("int8-cpu")
    one, two = target.infer(frame(0)), target.infer(frame(1))
    assert (one.seq, two.seq) == (0, 1)
    record = one.record()
    bundle = open_bundle(toy_bundle())
    assert record["bundle"] == bundle.digest
    assert record["model"] == bundle.model_sha256("int8-cpu")
    assert (record["tier"], record["provider"]) == ("int8-cpu", "CPUExecutionProvider")
    assert record["published_ns"] >= record["stamp_ns"]
    assert record["valid"] is True
