"""Peak memory of a runtime in a process of its own: in a shared one the peak belongs to whoever came first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fmdeploy.runtime.bundle import Bundle

PROBE_TIMEOUT_S = 120.0
PROBE_RUNS = 20


def peak_mib(status: Path = Path("/proc/self/status")) -> float | None:
    """Return this process's largest resident set so far (VmHWM), in MiB; None where the kernel does not say."""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return None


def probe_peak_mib(bundle: Bundle, tier: str, *, threads: int) -> float | None:
    """Return the peak memory of a fresh process that loads one tier and runs frames; None if it cannot be measured."""
    command = [sys.executable, "-m", "fmdeploy.runtime.measure.memory", str(bundle.artifact.root), tier, str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        found = json.loads(done.stdout)["peak_mib"] if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError):
        return None
    return None if found is None else float(found)


def main(root: str, tier: str, threads: str) -> None:
    """Load one tier, run a few frames, print the peak as JSON."""
    from fmdeploy.runtime.measure.latency import golden_frames
    from fmdeploy.runtime.session import Runtime

    runtime = Runtime(root, tiers=(tier,), threads=int(threads))
    frames = golden_frames(runtime.bundle)
    for number in range(PROBE_RUNS):
        runtime.infer(frames[number % len(frames)])
    print(json.dumps({"peak_mib": peak_mib()}))


if __name__ == "__main__":
    main(*sys.argv[1:4])
