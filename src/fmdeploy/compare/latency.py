"""Is a candidate as fast as what is deployed? Only two CHECKs of one machine under one condition can say."""

from __future__ import annotations

from typing import Any

from fmdeploy.artifact import Artifact
from fmdeploy.evaluate.gates import Row, limit_gate, not_measured

NAME = "latency p50 ratio, candidate / deployed"


def latency_row(candidate: Artifact, deployed: Artifact, tiers: tuple[str, str], limit: float) -> Row:
    """Gate the ratio of the p50 latencies that two CHECKs measured.

    Args:
        candidate: A CHECK.
        deployed: A CHECK.
        tiers: Of each.
        limit: Largest ratio.
    """
    name, (tier, before_tier) = NAME, tiers
    if _machine(candidate) != _machine(deployed):
        return not_measured(name, "the two checks ran on different machines", limit=limit, unit="x")
    after = candidate.json("check.json")["latency"][tier]
    before = deployed.json("check.json")["latency"][before_tier]
    if after["threads"] != before["threads"]:
        reason = f"the checks ran with {after['threads']} and {before['threads']} threads"
        return not_measured(name, reason, limit=limit, unit="x")
    if reason := _conditions_differ(candidate, deployed):
        return not_measured(name, reason, limit=limit, unit="x")
    return limit_gate(name, after["p50_ms"] / before["p50_ms"], limit, "x")


def _conditions_differ(candidate: Artifact, deployed: Artifact) -> str:
    """Why the times of two checks cannot be compared; empty where they can."""
    conditions = [check.json("check.json").get("conditions", {}) for check in (candidate, deployed)]
    for who, found in zip(("candidate", "deployed"), conditions, strict=True):
        if found.get("tainted") or found.get("unknown"):
            return f"the check of the {who} is no measurement: {(found['tainted'] or found['unknown'])[0]}"
    modes = [(found.get("power_mode") or {}).get("name") for found in conditions]
    return "" if modes[0] == modes[1] else f"the checks ran in power modes {modes[0]} and {modes[1]}"


def _machine(check: Artifact) -> tuple[Any, ...]:
    environment = check.manifest.environment
    return tuple(environment.get(key) for key in ("processor", "num_cpus", "machine"))
