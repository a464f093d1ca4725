"""Peak memory of a runtime in a process of its own: in a shared one the peak belongs to whoever came first.

On a PC the peak is the process's largest resident set, VmHWM. On a Jetson CPU and GPU share one memory and CUDA's part
is not resident in the process: there it is the largest of VmHWM, the growth of MemTotal − MemAvailable and the growth
of NvMapMemUsed, all three seen at 10 Hz or more by another process. What one of them needs and nobody knows is no peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fmdeploy.jetson.memory import table_of
from fmdeploy.jetson.telemetry import Telemetry
from fmdeploy.jetson.window import Window
from fmdeploy.runtime.bundle import Bundle

PROBE_TIMEOUT_S = 120.0
PROBE_RUNS = 20
MIN_RATE_HZ = 10.0


@dataclass(frozen=True)
class PeakMemory:
    """Memory that one tier takes, in MiB; None where it is not known.

    Attributes:
        board: Whether this is a Jetson.
        process_mib: VmHWM of a process that does nothing else.
        pss_mib: Peak of its fair share of pages that it shares with others.
        used_delta_mib: Growth of MemTotal − MemAvailable, which others on the machine change, too.
        nvmap_delta_mib: Growth of NvMapMemUsed.
        swap_ins: Pages that came back from swap meanwhile.
        problem: Why there is nothing; empty when all is well.
    """

    board: bool = False
    process_mib: float | None = None
    pss_mib: float | None = None
    used_delta_mib: float | None = None
    nvmap_delta_mib: float | None = None
    swap_ins: int | None = None
    problem: str = ""

    @property
    def why_not(self) -> str:
        """Why this is no measurement; empty when it is one."""
        if self.problem:
            return self.problem
        if self.swap_ins:
            return f"tainted: {self.swap_ins} pages came back from swap"
        if self.swap_ins is None:
            return "swap-ins are unknown"
        needed = {"VmHWM": self.process_mib}
        if self.board:
            needed |= {"MemAvailable": self.used_delta_mib, "NvMapMemUsed": self.nvmap_delta_mib}
        missing = [name for name, value in needed.items() if value is None]
        return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} unknown" if missing else ""

    @property
    def peak_mib(self) -> float | None:
        """What is held against the budget; None when it is not measured."""
        parts = [self.process_mib, *((self.used_delta_mib, self.nvmap_delta_mib) if self.board else ())]
        return None if self.why_not else max(part for part in parts if part is not None)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {**asdict(self), "peak_mib": self.peak_mib, "why_not": self.why_not}


def peak_mib(status: Path = Path("/proc/self/status")) -> float | None:
    """Return this process's largest resident set so far (VmHWM), in MiB; None where the kernel does not say."""
    try:
        return table_of(status.read_text()).get("VmHWM")
    except OSError:
        return None


def probe_memory(
    bundle: Bundle, tier: str, *, threads: int, root: Path = Path("/"), engines: Path | None = None,
    telemetry: Telemetry | None = None,
) -> PeakMemory:
    """Let a fresh process load one tier and run frames, and watch the memory from another one.

    Args:
        bundle: What to run; its files were just read, so that the page cache is warm.
        tier: Tier.
        threads: Threads inside one run.
        root: Folder below which /proc and /sys of the machine are; another than / for tests.
        engines: Folder of ENGINEs, for tiers of TensorRT.
        telemetry: Watches `root` already; None: one is started for this probe alone.
    """
    command = [sys.executable, "-m", "fmdeploy.runtime.measure.memory", str(bundle.artifact.root), tier, str(threads),
               "" if engines is None else str(engines)]
    with nullcontext(telemetry) if telemetry else Telemetry(root) as eyes:
        eyes.begin()
        try:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                     env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        except OSError as error:
            return PeakMemory(problem=f"the probe does not start: {error.strerror}")
        eyes.watch(child.pid)
        found, problem = _answer(child, tier)
        window = eyes.end()
    return _judge(window, found, problem)


def _answer(child: subprocess.Popen[str], tier: str) -> tuple[float | None, str]:
    try:
        output, _ = child.communicate(timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return None, f"the probe did not end within {PROBE_TIMEOUT_S:g} s"
    if child.returncode != 0:
        return None, f"{tier} does not run in a process of its own (exit {child.returncode})"
    try:
        found = json.loads(output)["peak_mib"]
    except (ValueError, KeyError):
        return None, "the probe says nothing"
    return (None if found is None else float(found)), ""


def _judge(window: Window | None, process_mib: float | None, problem: str) -> PeakMemory:
    if window is None:
        return PeakMemory(process_mib=process_mib, problem=problem or "telemetry says nothing")
    if not problem and window.board and (window.rate_hz or 0) < MIN_RATE_HZ:
        problem = f"memory was seen at {window.rate_hz or 0:.1f} Hz, at least {MIN_RATE_HZ:g} are needed"
    return PeakMemory(window.board, process_mib, window.process_pss_mib, window.used_delta_mib,
                      window.nvmap_delta_mib, window.swap_ins, problem)


def main(root: str, tier: str, threads: str, engines: str) -> None:
    """Load one tier, run a few frames, print the peak as JSON."""
    from fmdeploy.runtime.loading import Terms
    from fmdeploy.runtime.measure.latency import golden_frames
    from fmdeploy.runtime.session import Runtime
    from fmdeploy.runtime.trial import NO_TARGET

    terms = Terms(engines=Path(engines) if engines else None, target=NO_TARGET)
    runtime = Runtime(root, tiers=(tier,), threads=int(threads), terms=terms)
    frames = golden_frames(runtime.bundle)
    for number in range(PROBE_RUNS):
        runtime.infer(frames[number % len(frames)])
    print(json.dumps({"peak_mib": peak_mib()}))


if __name__ == "__main__":
    main(*sys.argv[1:5])
