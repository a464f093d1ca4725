"""`fmdeploy bench`: what a bundle costs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath, Positional, RequiredKey, RunOnly, StageConfig
from fmdeploy.errors import ModelFileError
from fmdeploy.jetson.telemetry import Telemetry
from fmdeploy.runtime.bundle import open_bundle
from fmdeploy.runtime.loading import Terms
from fmdeploy.runtime.measure.conditions import describe_machine, watched
from fmdeploy.runtime.measure.latency import Speedup, golden_frames, measure_latency, measure_overhead, speedup, summary
from fmdeploy.runtime.measure.memory import probe_memory
from fmdeploy.runtime.session import Runtime
from fmdeploy.runtime.tiers import TIERS
from fmdeploy.runtime.trial import NO_TARGET


class BenchConfig(StageConfig):
    """Options of `fmdeploy bench`."""

    bundle: Annotated[InputPath, Positional()] = Field(description="Folder of a BUNDLE")
    tiers: tuple[str, ...] = Field(default=TIERS, min_length=1, description="Variants to measure")
    threads: Annotated[int, RunOnly()] = Field(default=1, ge=1, le=256, description="Threads inside one run")
    runs: int = Field(default=300, ge=30, description="Rounds in which every tier takes one frame")
    engines: InputPath | None = Field(default=None, description="Folder of ENGINEs, for tiers of TensorRT")
    root: InputPath = Field(
        default=Path("/"), description="Folder below which /proc, /sys and the board's tools are read; for tests"
    )
    require_signature: RequiredKey = None


@command(BenchConfig)
def bench(config: BenchConfig) -> Outcome:
    """Measure latency, memory and the cost of the guards, tiers taking turns, and say under which conditions."""
    bundle = open_bundle(config.bundle, require_signature=config.require_signature)
    runtimes, refused = start_tiers(config.tiers, bundle, config.threads, config.engines)
    if not runtimes:
        raise ModelFileError("no tier passes its self-test here: " + "; ".join(f"{k}: {v}" for k, v in refused.items()),
                             where=config.bundle)
    frames = golden_frames(bundle)
    with Telemetry(config.root) as eyes:
        times, conditions = watched(lambda: measure_latency(runtimes, frames, config.runs), config.root, eyes)
        peaks = {name: probe_memory(bundle, name, threads=config.threads, root=config.root, engines=config.engines,
                                    telemetry=eyes) for name in runtimes}
    data: dict[str, Any] = {"bundle": bundle.digest, "signature": bundle.signature.to_json(), "threads": config.threads,
                            "refused": refused, "tiers": {},
                            "conditions": conditions.to_json(), "environment": describe_machine(config.root)}
    for name, runtime in runtimes.items():
        data["tiers"][name] = {
            **summary(times[name]),
            "provider": runtime.backend.provider,
            "overhead": measure_overhead(runtime, frames, config.runs),
            "peak_mib": peaks[name].peak_mib,
            "memory": peaks[name].to_json(),
        }
    if "fp32" in times:
        data["speedup"] = {n: speedup(times["fp32"], times[n]).__dict__ for n in times if n != "fp32"}
    return Outcome((*_lines(data), *conditions.lines(), bundle.signature.note()), data)


def start_tiers(
    tiers: tuple[str, ...], bundle: Any, threads: int, engines: Path | None = None
) -> tuple[dict[str, Runtime], dict[str, str]]:
    """Start one runtime a tier, whatever it costs; return them, and the reasons of those that were refused."""
    terms = Terms(engines=engines, target=NO_TARGET)
    runtimes: dict[str, Runtime] = {}
    refused: dict[str, str] = {}
    for tier in tiers:
        try:
            runtimes[tier] = Runtime(bundle, tiers=(tier,), threads=threads, terms=terms)
        except ModelFileError as error:
            refused[tier] = str(error)
    return runtimes, refused


def _lines(data: dict[str, Any]) -> list[str]:
    lines = [f"{'tier':10} {'p50':>8} {'p95':>8} {'p99':>8} {'max':>8} ms   peak MiB   guards µs"]
    for name, row in data["tiers"].items():
        numbers = " ".join(_cell(row[key]) for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms"))
        lines.append(f"{name:10} {numbers}      {_cell(row['peak_mib'])}   {row['overhead']['overhead_us']:8.1f}")
    for name, raw in data.get("speedup", {}).items():
        found = Speedup(**raw)
        lines.append(f"{name} is {found.value:.2f} [{found.low:.2f}, {found.high:.2f}] times as fast as fp32")
    return lines + [f"{name} refused: {reason}" for name, reason in data["refused"].items()]


def _cell(value: float | None) -> str:
    return f"{'-':>8}" if value is None else f"{value:8.3f}"
