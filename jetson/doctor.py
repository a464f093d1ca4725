"""`fmdeploy doctor`: what this machine is, what is wrong with it, and what to do about each.

It reads and asks, and changes nothing. `--root DIR` looks at a machine whose files lie below DIR, and runs only the
programs that lie there, too.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath, StageConfig
from fmdeploy.errors import ConfigError
from fmdeploy.jetson.checks import container, dla, python, release, software, state
from fmdeploy.jetson.checks.finding import Check, Diagnosis, Severity, Site

MARKS = {Severity.OK: "ok", Severity.WARN: "warn", Severity.FAIL: "FAIL", Severity.UNKNOWN: "unknown"}


class Named(NamedTuple):
    """A check with the name that its diagnoses carry."""

    name: str
    check: Check


CHECKS = (
    Named("l4t", release.l4t),
    Named("jetpack", release.jetpack),
    Named("l4t-packages", release.packages),
    Named("tensorrt", software.tensorrt),
    Named("tensorrt-python", software.tensorrt_import),
    Named("cuda", software.cuda),
    Named("sm87", software.sm87),
    Named("dla", dla.dla),
    Named("power-mode", state.power_mode),
    Named("clocks", state.clocks),
    Named("temperatures", state.temperatures),
    Named("throttling", state.throttling),
    Named("over-current", state.over_current),
    Named("memory", state.memory),
    Named("swap", state.swap),
    Named("tegrastats", state.tegrastats),
    Named("container", container.container),
    Named("devices", container.devices),
    Named("docker", container.docker),
    Named("python", python.python),
    Named("onnxruntime", python.onnxruntime),
    Named("providers", python.providers),
    Named("processor", python.processor),
)


class DoctorConfig(StageConfig):
    """Options of `fmdeploy doctor`."""

    root: InputPath = Field(default=Path("/"), description="Look at the machine whose files lie below this folder")


@command(DoctorConfig)
def doctor(config: DoctorConfig) -> Outcome:
    """Say what this machine is, what is wrong with it, and what to do; exit 1 when something fails."""
    if not config.root.is_dir():
        raise ConfigError("is no folder", where=config.root, fix="Give the folder below which etc, proc and sys are")
    site = Site(config.root)
    return outcome(site, examine(site))


def examine(site: Site) -> list[Diagnosis]:
    """Run all checks. One that a machine confuses says so; it does not hide the others."""
    found: list[Diagnosis] = []
    for name, check in CHECKS:
        try:
            found += check(site)
        except (OSError, ValueError, IndexError) as error:
            found.append(Diagnosis(name, Severity.UNKNOWN, f"this check could not finish: {error}"))
    return found


def outcome(site: Site, found: list[Diagnosis]) -> Outcome:
    """Return the lines, the JSON and the exit code."""
    counts = Counter(diagnosis.severity for diagnosis in found)
    lines = [line for diagnosis in found for line in _lines(diagnosis)]
    total = ", ".join(f"{counts[severity]} {MARKS[severity]}" for severity in Severity if counts[severity])
    failed = counts[Severity.FAIL] > 0
    data = {
        "root": str(site.root), "jetson": site.jetson, "container": site.container,
        "l4t": site.l4t, "board": site.board,
        "healthy": not failed, "findings": [diagnosis.to_json() for diagnosis in found],
        "counts": {severity.value: counts[severity] for severity in Severity},
    }
    return Outcome((*lines, total), data, 1 if failed else 0)


def _lines(diagnosis: Diagnosis) -> list[str]:
    lines = [f"{MARKS[diagnosis.severity]:>7}  {diagnosis.check}: {diagnosis.what}"]
    if diagnosis.severity is not Severity.OK:
        pairs = ("expected", diagnosis.expected), ("found", diagnosis.found)
        facts = ", ".join(f"{name} {text}" for name, text in pairs if text)
        lines += [f"         {facts}"] if facts else []
    if diagnosis.fix:
        lines.append(f"         → {diagnosis.fix}")
    return lines
