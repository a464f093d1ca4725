"""Which release this is, and whether all of its packages are of one release."""

from __future__ import annotations

import re
from collections import Counter

from fmdeploy.jetson.checks.finding import Diagnosis, Severity, Site
from fmdeploy.jetson.jetpack import jetpack_of
from fmdeploy.jetson.machine import RELEASE, kernel

MOUNT = "Start the container with -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro"


def l4t(site: Site) -> list[Diagnosis]:
    """Release of Jetson Linux."""
    if not site.jetson:
        text = "this is no Jetson: it can make, check and serve bundles on its own processor"
        return [Diagnosis("l4t", Severity.OK, text, found=kernel(site.root) or "unknown kernel")]
    if site.l4t is None:
        inside = Severity.WARN if site.container else Severity.FAIL
        fix = MOUNT if site.container else "Flash Jetson Linux anew, or install the package nvidia-l4t-core"
        return [Diagnosis("l4t", inside, "the release of Jetson Linux is not known here",
                          expected=f"/{RELEASE}", found=kernel(site.root) or "nothing", fix=fix)]
    return [Diagnosis("l4t", Severity.OK, f"Jetson Linux {site.l4t} on {site.board or 'an unknown board'}",
                      found=site.l4t)]


def jetpack(site: Site) -> list[Diagnosis]:
    """JetPack that the release belongs to, and whether an Orin can use it."""
    if site.l4t is None:
        return []
    row = jetpack_of(site.l4t)
    if row is None:
        return [Diagnosis("jetpack", Severity.UNKNOWN, "this release is in no table of JetPacks", found=site.l4t,
                          fix="Go by the versions of TensorRT and CUDA")]
    text = f"JetPack {row.label}{f' ({row.note})' if row.note else ''}: a label, what counts is L4T, TensorRT and CUDA"
    if not row.orin:
        return [Diagnosis("jetpack", Severity.FAIL, f"JetPack {row.label} is not for Orin", expected="JetPack 6.1, 6.2 "
                          "or 7.2", found=site.l4t, fix="Flash JetPack 7.2 or 6.2")]
    if row.tensorrt.startswith("8."):
        return [Diagnosis("jetpack", Severity.FAIL, f"JetPack {row.label} comes with TensorRT {row.tensorrt}",
                          expected="TensorRT 10.3 or later: JetPack 6.1", found=site.l4t,
                          fix="Flash JetPack 6.2 or 7.2")]
    return [Diagnosis("jetpack", Severity.OK, text, found=site.l4t)]


def packages(site: Site) -> list[Diagnosis]:
    """Version of every nvidia-l4t package; a half-done upgrade leaves two of them."""
    found = {name: version for name, version in site.packages.items() if name.startswith("nvidia-l4t-")}
    if not found:
        return [Diagnosis("l4t-packages", Severity.UNKNOWN, "no nvidia-l4t package is listed here",
                          fix="Run the doctor on the host")] if site.jetson and not site.container else []
    releases = Counter(release_of(version) for version in found.values())
    listed = ", ".join(f"{name} {version}" for name, version in sorted(found.items()))
    if len(releases) == 1:
        return [Diagnosis("l4t-packages", Severity.OK, f"{len(found)} packages, all of {next(iter(releases))}",
                          found=listed)]
    most = releases.most_common(1)[0][0]
    odd = ", ".join(f"{name} {version}" for name, version in sorted(found.items())
                    if release_of(version) != most)
    return [Diagnosis("l4t-packages", Severity.FAIL, f"packages of {len(releases)} releases are mixed: {odd}",
                      expected=f"all of {most}", found=listed,
                      fix="Run: sudo apt update && sudo apt full-upgrade, then restart")]


def release_of(version: str) -> str:
    """Return the release in a package's version: `36.4.4` of `36.4.4-2025…` and of `5.15.148-tegra-36.4.4-2025…`."""
    found = re.search(r"(\d{2}\.\d+(?:\.\d+)?)-\d{8,}", version)
    return found[1] if found else version.partition("-")[0]
