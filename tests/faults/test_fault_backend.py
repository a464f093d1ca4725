"""A backend that raises (F5), a device that is lost (F7), a fork (F37), many threads (T14). Embedded runtime."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.errors import ModelFileError
from fmdeploy.runtime import GuardConfig, Reason, Runtime, open_bundle
from fmdeploy.runtime.backends.protocol import DeviceLostError
from fmdeploy.runtime.guards.content import SAMPLES
from fmdeploy.runtime.inference import Inference
from fmdeploy.runtime.state import Policy, State
from support.bundles import Arrays, run_model
from support.fdti import Fdti
from support.runtimes import frame, runtime, toy_bundle

BOTH = ("int8-cpu", "fp32")


def break_backend(target: Runtime | Inference, when: Any, error: Exception | None = None) -> None:
    """Let the backend raise on calls for which `when(feeds, number)` holds; numbers start at 1."""
    run, numbers = target.backend.run, itertools.count(1)

    def broken(feeds: Arrays) -> Any:
        if when(feeds, next(numbers)):
            raise error or RuntimeError("kernel failed\nlong story")
        return run(feeds)

    target.backend.run = broken  # type: ignore[method-assign]


def test_F5_backend_that_raises_costs_one_frame(fdti: Fdti) -> None:
    target = runtime()
    break_backend(target, lambda feeds, number: number % 3 == 0)
    assert all(target.infer(frame(number)).valid for number in range(2))
    with fdti.detecting("in the same frame"):
        found = target.infer(frame(2))
    assert (found.valid, found.reasons, found.outputs) == (False, (Reason.BACKEND_ERROR,), {})
    assert found.findings[0].detail == "kernel failed"
    states = [target.infer(frame(number)) for number in range(3, 20)]
    assert [state.valid for state in states] == [number % 3 != 0 for number in range(4, 21)]
    assert {state.state for state in states} == {"ACTIVE"}
    assert states[-1].counters["backend_errors"] == target.inference.num_backend_errors == 6


def test_F5_after_k_errors_the_next_tier_takes_over(fdti: Fdti) -> None:
    target = Runtime(toy_bundle(), tiers=BOTH, standby=True, policy=Policy(backend_errors=3))
    target.wait()
    assert target.inference.admitted == BOTH, "the next tier is on standby"
    golden = target.infer(frame(0))
    break_backend(target, lambda feeds, number: True)
    errors = [target.infer(frame(number)) for number in range(1, 4)]
    detected = time.perf_counter_ns()
    first = target.infer(frame(4))
    fdti.report((time.perf_counter_ns() - detected) / 1e6, "from the third error to the first valid frame")
    assert [error.valid for error in errors] == [False] * 3
    assert [error.mode for error in errors] == ["", "", "D4"]
    assert (first.valid, first.tier, first.mode, first.reasons) == (True, "fp32", "D2", (Reason.FALLBACK,))
    assert first.model == target.bundle.model_sha256("fp32") != golden.model
    wanted = run_model(target.bundle.model_bytes("fp32"), {k: v[None] for k, v in frame(4).items()})["bev"][0]
    assert np.array_equal(first.outputs["bev"], wanted)
    assert first.counters["fallbacks"] == 1
    target.close()


def test_F5_the_first_tier_comes_back_only_with_a_self_test() -> None:
    policy = Policy(backend_errors=2, good_frames=2, better_tier_ms=0)
    target = Runtime(toy_bundle(), tiers=BOTH, policy=policy)
    break_backend(target, lambda feeds, number: True)
    assert [target.infer(frame(number)).valid for number in range(2)] == [False, False]
    admit, refused = target.inference.admit, []

    def refuse(tier: str, *, again: bool = False) -> Any:
        report = admit(tier, again=again)
        if again:
            refused.append(tier)
            return type(report)(tier, False, "still broken")
        return report

    target.inference.admit = refuse  # type: ignore[method-assign]
    for number in range(2, 5):
        assert target.infer(frame(number)).tier == "fp32"
        target.wait()
    assert "int8-cpu" in refused
    assert target.tier == "fp32", "a tier that fails its test stays out"
    target.inference.admit = admit  # type: ignore[method-assign]
    for number in range(5, 9):
        assert target.infer(frame(number)).valid
        target.wait()
    found = target.infer(frame(9))
    assert (found.tier, found.state, found.reasons, found.valid) == ("int8-cpu", "ACTIVE", (), True)
    target.close()


def test_F5_control_no_error_no_fallback() -> None:
    target = Runtime(toy_bundle(), tiers=BOTH)
    states = [target.infer(frame(number)) for number in range(12)]
    assert {(state.valid, state.tier, state.state) for state in states} == {(True, "int8-cpu", "ACTIVE")}
    assert states[-1].counters["backend_errors"] == 0


def test_F5_a_frame_that_breaks_the_model_is_not_the_models_fault() -> None:
    """Errors that the golden input does not show come from the frames: neither a fallback nor a lost device."""
    target = Runtime(toy_bundle(), tiers=BOTH, policy=Policy(backend_errors=2, invalid_ms=60_000))
    break_backend(target, lambda feeds, number: float(feeds["lidar"][0, 0, 0, 0]) == 0.5)
    poison = frame(1)
    poison["lidar"][0, 0, 0] = 0.5
    for number in range(6):
        bad = {"lidar": poison["lidar"].copy(), "camera": frame(number)["camera"]}
        bad["lidar"][0, 1, 1] = number / 10
        found = target.infer(bad)
        assert (found.reasons, found.tier, found.state) == ((Reason.BACKEND_ERROR,), "int8-cpu", "READY")
    clean = frame(3)
    clean["lidar"][0, 0, 0] = 0.0
    assert target.infer(clean).valid


def test_F7_sticky_device_error_is_a_fault(fdti: Fdti) -> None:
    target = runtime()
    break_backend(target, lambda feeds, number: number > 1, RuntimeError("CUDA error 700: illegal address"))
    assert target.infer(frame(0)).valid
    start = time.perf_counter_ns()
    first, second = target.infer(frame(1)), target.infer(frame(2))
    fdti.report((time.perf_counter_ns() - start) / 1e6, "two frames with the same error and the golden input")
    assert (first.reasons, first.state) == ((Reason.BACKEND_ERROR,), "ACTIVE")
    assert (second.reasons, second.state, second.valid) == ((Reason.DEVICE_LOST,), "FAULT", False)
    health = target.health()
    assert (health.live, health.ready) == (False, False)
    calls = target.inference.num_backend_errors
    for number in range(3, 6):
        later = target.infer(frame(number))
        assert (later.valid, later.reasons, later.outputs) == (False, (Reason.DEVICE_LOST,), {})
    assert target.inference.num_backend_errors == calls, "nothing more is asked of the device"
    target.reset()
    assert not target.health().live, "only a new process helps"


def test_F7_a_backend_that_knows_its_device_is_lost_is_believed() -> None:
    target = Runtime(toy_bundle(), tiers=BOTH)
    break_backend(target, lambda feeds, number: True, DeviceLostError("the CUDA context is gone"))
    found = target.infer(frame())
    assert (found.reasons, found.state) == ((Reason.DEVICE_LOST,), "FAULT")


def test_F7_the_command_ends_with_a_code(tmp_path: Path) -> None:
    """`fmdeploy run` on a device that is lost stops, and not with 0."""
    done = subprocess.run([sys.executable, "-c", LOST_WHILE_RUNNING, str(toy_bundle())], capture_output=True, text=True,
                          check=False, timeout=120)
    assert done.returncode == 3, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["valid"] for line in lines] == [True, False, False]
    assert lines[-1]["reasons"] == ["DEVICE_LOST"]
    assert "the device is lost" in done.stderr


LOST_WHILE_RUNNING = """
import sys
from fmdeploy import cli
from fmdeploy.runtime import run as verb
from fmdeploy.runtime.backends.onnxrt import OrtBackend
sys.path.insert(0, "tests")
from support.fdti import Fdti
from support.runtimes import frame

run, calls = OrtBackend.run, []
def lost(self, feeds):
    if calls and sum(calls) >= 1:
        raise RuntimeError("CUDA error 700")
    return run(self, feeds)
OrtBackend.run = lost
class Samples:
    ids = [f"s/{i}" for i in range(20)]
    def __len__(self): return 20
verb.open_dataset = lambda path: type("Data", (), {"digest": "0" * 64})()
verb.load_task = lambda name: type("Task", (), {"samples": lambda self, data, split: Samples()})()
def frames(samples, limit=None):
    for i in range(20):
        yield samples.ids[i], frame(i)
        calls.append(1)
verb.frames_of = frames
sys.exit(cli.main(["run", sys.argv[1], "--data", ".", "--task", "x", "--tiers", "fp32", "--keep-going", "--json"]))
"""


def test_F7_control_different_errors_are_not_a_lost_device() -> None:
    target = runtime()
    run, numbers = target.backend.run, itertools.count(1)

    def flaky(feeds: Arrays) -> Any:
        if (number := next(numbers)) % 2:
            raise RuntimeError(f"error {number}")
        return run(feeds)

    target.backend.run = flaky  # type: ignore[method-assign]
    assert [target.infer(frame(number)).valid for number in range(8)] == [False, True] * 4
    assert target.health().live


FORKED = """
import json, os, sys, time
from fmdeploy.runtime import Runtime
runtime = Runtime(sys.argv[1], tiers=("fp32",))
sample = {name: array.copy() for name, array in runtime.bundle.golden.sample(0).items()}
reader, writer = os.pipe()
start = time.perf_counter_ns()
if os.fork() == 0:
    said = {}
    for name, call in (("infer", lambda: runtime.infer(sample)), ("poll", runtime.poll), ("health", runtime.health),
                       ("reset", runtime.reset), ("close", runtime.close)):
        try:
            call()
            said[name] = ""
        except Exception as error:
            said[name] = str(error)
    os.write(writer, json.dumps([said, (time.perf_counter_ns() - start) / 1e6]).encode())
    os._exit(0)
os.wait()
print(os.read(reader, 65536).decode())
print(json.dumps(runtime.infer(sample).valid))
"""


def test_F37_a_forked_child_is_refused_and_the_parent_goes_on(fdti: Fdti) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED, str(toy_bundle())], capture_output=True, text=True,
                          check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    child, parent = done.stdout.splitlines()
    said, took_ms = json.loads(child)
    fdti.report(took_ms, "from the fork to all refusals")
    assert {said[name] for name in ("infer", "poll", "health", "reset")} == {
        "the runtime was forked; start it in the process that uses it"}
    assert said["close"] == "", "what was forked belongs to the parent"
    assert json.loads(parent) is True


SPAWNED = """
import multiprocessing, sys
def child(folder, answer):
    from fmdeploy.runtime import Runtime
    runtime = Runtime(folder, tiers=("fp32",))
    answer.put(runtime.infer(runtime.bundle.golden.sample(0)).valid)
if __name__ == "__main__":
    from fmdeploy.runtime import Runtime
    runtime = Runtime(sys.argv[1], tiers=("fp32",))
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=child, args=(sys.argv[1], answer))
    process.start()
    print(answer.get(timeout=60), runtime.infer(runtime.bundle.golden.sample(0)).valid)
    process.join()
"""


def test_F37_control_a_spawned_child_with_its_own_runtime(tmp_path: Path) -> None:
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    done = subprocess.run([sys.executable, str(script), str(toy_bundle())], capture_output=True, text=True, check=False,
                          timeout=90)
    assert done.stdout.split() == ["True", "True"], done.stderr


def together(target: Runtime, threads: int, frames: int) -> list[Any]:
    """Results of that many threads, which begin at the same moment: (seed, frame)."""
    barrier, results = threading.Barrier(threads), []

    def work(first: int) -> None:
        barrier.wait()
        for seed in range(first * frames, (first + 1) * frames):
            results.append((seed, target.infer(frame(seed))))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results


@pytest.mark.parametrize("threads", [8])
def test_T14_many_threads_share_a_runtime(fdti: Fdti, threads: int) -> None:
    """Calls are served one after the other: each gets the answer to its own frame, under its own number."""
    target = runtime(guards=SAMPLES)
    with fdti.detecting(f"{threads * 25} frames of {threads} threads, 0 mixed up"):
        results = together(target, threads, 25)
    bundle = open_bundle(toy_bundle())
    batch = {name: np.stack([frame(seed)[name] for seed, _ in results]) for name in frame()}
    wanted = run_model(bundle.model_bytes("fp32"), batch)["bev"]
    assert all(np.array_equal(found.outputs["bev"], wanted[at]) for at, (_, found) in enumerate(results))
    assert sorted(found.seq for _, found in results) == list(range(threads * 25))
    assert all(found.valid for _, found in results)
    assert target.publisher.counters["valid"] == threads * 25


def test_T14_control_one_thread() -> None:
    results = together(runtime(guards=SAMPLES), 1, 25)
    assert [found.seq for _, found in results] == list(range(25))


def test_poll_does_not_wait_for_a_frame_in_flight() -> None:
    target = runtime()
    run = target.backend.run
    entered, leave = threading.Event(), threading.Event()

    def stuck(feeds: Arrays) -> Any:
        entered.set()
        leave.wait()
        return run(feeds)

    target.backend.run = stuck  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: target.infer(frame()))
    thread.start()
    assert entered.wait(30)
    start = time.perf_counter()
    assert target.poll() is None
    assert target.publisher.state is State.READY
    assert time.perf_counter() - start < 5
    leave.set()
    thread.join()


def test_periodic_self_test_takes_a_broken_tier_out_of_service() -> None:
    """A weight that flips while it runs: outputs stay plausible, and only the golden input tells."""
    target = Runtime(toy_bundle(), tiers=BOTH, policy=Policy(self_test_ms=0), guards=GuardConfig(frozen_after=0))
    assert target.infer(frame(0)).valid
    assert target.poll() is None
    assert target.infer(frame(1)).state == "ACTIVE", "control: a good tier passes"
    run = target.backend.run
    target.backend.run = lambda feeds: [array * 1.5 for array in run(feeds)]  # type: ignore[method-assign]
    assert target.infer(frame(2)).valid, "nothing else notices"
    target.poll()
    found = target.infer(frame(3))
    assert (found.valid, found.tier, found.mode, found.reasons) == (True, "fp32", "D2", (Reason.FALLBACK,))
    alone = Runtime(toy_bundle(), tiers=("fp32",), policy=Policy(self_test_ms=0))
    run_alone = alone.backend.run
    alone.backend.run = lambda feeds: [array * 1.5 for array in run_alone(feeds)]  # type: ignore[method-assign]
    alone.poll()
    found = alone.infer(frame(4))
    assert (found.valid, found.mode, found.outputs) == (False, "D4", {}), "no tier is left: no perception"


def test_an_operator_resets_what_was_latched() -> None:
    from fmdeploy.runtime.state import EventKind

    policy = Policy(supervised=True, max_restarts=0)
    target = Runtime(toy_bundle(), tiers=("fp32",), policy=policy)
    target.publisher.tell(EventKind.WORKER_LOST)
    latched = target.infer(frame(0))
    assert (latched.valid, latched.state, latched.reasons) == (False, "SAFE_OUTPUT", (Reason.LATCHED,))
    run = target.backend.run
    target.backend.run = lambda feeds: [array * 0 for array in run(feeds)]  # type: ignore[method-assign]
    target.reset()
    found = target.infer(frame(1))
    assert (found.valid, found.state) == (True, "ACTIVE"), "the tier was loaded anew, and passed"


def test_a_tier_that_is_refused_is_not_used() -> None:
    target = Runtime(toy_bundle(), tiers=("fp32", "int4"))
    with pytest.raises(ModelFileError, match="tier int4 is refused here"):
        target.inference.use("int4")
    assert target.infer(frame()).tier == "fp32"


def test_closed_runtime_publishes_nothing_valid() -> None:
    with runtime() as target:
        assert target.infer(frame(0)).valid
    found = target.infer(frame(1))
    assert (found.valid, found.state, found.reasons) == (False, "UNCONFIGURED", (Reason.NOT_READY,))
    assert not target.health().ready
    target.close()
