"""From the start of a process to READY, against a bare ONNX Runtime session with the same self-test.

    python benchmarks/cold_start.py BUNDLE [--runs 20] [--tier int8-cpu]

Every run is a fresh process, timed from its start to the line it prints when it is ready. The bare side imports
onnxruntime, makes a session from the file's bytes and runs the golden vectors as the self-test does; it verifies no
hash and knows no manifest, no guards and no budget. It is there twice: the second one is the A/A control. All sides
take turns, in an order that turns with them. Target: at most 1.5 times.

Below it: processor time of the whole process, which a busy machine changes least, and the time to READY without
imports: session or `Runtime`, and the self-test.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

TARGET = 1.5
BARE = """
import time
import numpy as np
import onnxruntime
from safetensors.numpy import load_file
start = time.perf_counter()
import json, sys
root, tier = sys.argv[1:3]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.log_severity_level = 3
with open(f"{root}/model.{tier}.onnx", "rb") as stream:
    session = onnxruntime.InferenceSession(stream.read(), options, providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
golden = load_file(f"{root}/golden.safetensors")
inputs = {name: golden[f"input.{name}"] for name in (arg.name for arg in session.get_inputs())}
count = len(next(iter(inputs.values())))
feeds = [{name: np.ascontiguousarray(array[k][None]) for name, array in inputs.items()} for k in range(count)]
for _ in range(3):
    session.run(names, feeds[0])
for k in range(max(count, 12)):
    outputs = session.run(names, feeds[k % count])
    if k < count:
        for name, found in zip(names, outputs):
            wanted = golden[f"output.{tier}.{name}"][k][None].astype(np.float64)
            noise = np.linalg.norm(wanted - found.astype(np.float64))
            assert noise <= 0.1 * np.linalg.norm(wanted)
print(json.dumps({"inside_ms": 1e3 * (time.perf_counter() - start)}), flush=True)
"""
RUNTIME = """
import time
import onnxruntime
from fmdeploy.runtime.session import Runtime
start = time.perf_counter()
import json, sys
runtime = Runtime(sys.argv[1], tiers=(sys.argv[2],))
print(json.dumps({"inside_ms": 1e3 * (time.perf_counter() - start), "state": runtime.state.value}), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--tier", default="int8-cpu")
    options = parser.parse_args()
    sides = {"bare": BARE, "runtime": RUNTIME, "bare again": BARE}
    whole: dict[str, list[float]] = {name: [] for name in sides}
    inside: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-2, options.runs):
        for name in sorted(sides, key=lambda name: (list(sides).index(name) + number) % len(sides)):
            found = run(sides[name], options.bundle, options.tier)
            for times, value in zip((whole, cpu, inside), found, strict=True):
                if number >= 0:
                    times[name].append(value)
    print(f"{options.runs} processes a side, {options.tier}")
    show("process start to ready", whole)
    show("processor time", cpu)
    show("without imports", inside)


def run(code: str, bundle: Path, tier: str) -> tuple[float, float, float]:
    """Milliseconds from a process's start to its line, of its processor time, and what it says about its own part."""
    # An installed package has its bytecode: the first, uncounted runs may write it.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before, started = os.times(), time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", code, str(bundle), tier], stdout=subprocess.PIPE, text=True,
                          env={**kept, "OMP_NUM_THREADS": "1"}) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        total = 1e3 * (time.perf_counter() - started)
    after = os.times()
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return total, 1e3 * used, float(json.loads(line)["inside_ms"])


def show(title: str, times: dict[str, list[float]]) -> None:
    """Medians, and medians of the ratios of neighbouring runs."""
    middle = {name: statistics.median(values) for name, values in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["runtime"], times["bare"], strict=True))
    control = statistics.median(a / b for a, b in zip(times["bare again"], times["bare"], strict=True))
    print(f"{title}: bare {middle['bare']:.0f} ms, runtime {middle['runtime']:.0f} ms "
          f"(fastest {min(times['bare']):.0f} and {min(times['runtime']):.0f})")
    print(f"  ratio   {ratio:.2f}   (target at most {TARGET:g}; fastest against fastest "
          f"{min(times['runtime']) / min(times['bare']):.2f})")
    print(f"  control {control:.2f}")


if __name__ == "__main__":
    main()
