"""Traps of containers on a Jetson: each looks like something else when it bites."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fmdeploy.jetson.checks.finding import Diagnosis, Severity, Site, User, version_of
from fmdeploy.jetson.checks.software import tensorrt_version
from fmdeploy.jetson.machine import RELEASE, kernel
from fmdeploy.jetson.reading import read_text

DEVICES = ("dev/nvmap", "dev/nvhost-gpu", "dev/nvhost-ctrl-gpu", "dev/nvgpu/igpu0/ctrl")
SBSA = (39,)  # from L4T 39 on the host has no libnvdla_compiler.so, and images for servers (SBSA) are used


def container(site: Site) -> list[Diagnosis]:
    """What the nvidia runtime should have put into this container."""
    if not (site.jetson and site.container):
        return []
    notes = [*_release(site), *_runtime(site), *_dla_library(site)]
    return notes or [Diagnosis("container", Severity.OK, "the container has what the host should give it")]


def _release(site: Site) -> list[Diagnosis]:
    if (site.root / RELEASE).exists():
        return []
    return [Diagnosis("container", Severity.WARN, "the host's release is not visible: engines cannot be bound to it",
                      expected=f"/{RELEASE}", found="not mounted",
                      fix="Start the container with -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro")]


def _runtime(site: Site) -> list[Diagnosis]:
    if site.library("libcuda.so*"):
        return []
    return [Diagnosis("container", Severity.FAIL, "the driver is not in this container: CUDA is absent",
                      expected="libcuda.so.1", found="none",
                      fix="Start it with --runtime nvidia; --gpus does not work on JetPack 5 and 6")]


def _dla_library(site: Site) -> list[Diagnosis]:
    """TensorRT for JetPack 6 links a library of the host's DLA compiler, which the host of JetPack 7 has not."""
    found = tensorrt_version(site)
    if found is None or version_of(found[0]) >= (10, 13) or site.library("libnvdla_compiler.so*"):
        return []
    newer = "tegra" in kernel(site.root) and version_of(kernel(site.root)) >= (6,)
    fix = ("This host is JetPack 7: use an ARM64 (SBSA) image, jetson/Dockerfile.jp7" if newer
           else "Start it with --runtime nvidia on a JetPack 6 host")
    return [Diagnosis("container", Severity.FAIL, f"TensorRT {found[0]} needs libnvdla_compiler.so: it does not load",
                      expected="libnvdla_compiler.so from the host", found="none", fix=fix)]


def devices(site: Site) -> list[Diagnosis]:
    """Whether this user may open the GPU's device files."""
    if not site.jetson:
        return []
    nodes = [site.root / name for name in DEVICES if (site.root / name).exists()]
    if not nodes:
        fix = "Start the container with --runtime nvidia" if site.container else "Run: sudo systemctl status nvgpu"
        return [Diagnosis("devices", Severity.FAIL, "the GPU's device files are not here", expected="/dev/nvmap",
                          found="none", fix=fix)]
    closed = [node for node in nodes if not may_open(node, site.user)]
    if closed:
        groups = ", ".join(sorted({str(node.stat().st_gid) for node in closed}))
        fix = (f"Start the container with --group-add {groups.replace(', ', ' --group-add ')} (video and render of the "
               "host, as numbers)" if site.container else "Run: sudo usermod -aG video,render $USER, then log in again")
        return [Diagnosis("devices", Severity.FAIL, f"user {site.user.uid} may not open the GPU's device files",
                          expected=f"member of group {groups}", found=", ".join(node.name for node in closed), fix=fix)]
    return [Diagnosis("devices", Severity.OK, "the GPU's device files can be opened",
                      found=", ".join(node.name for node in nodes))]


def may_open(node: Path, user: User) -> bool:
    """Whether a user may read and write a file, by its owner, group and mode."""
    try:
        found = os.stat(node)
    except OSError:
        return False
    if user.uid == 0:
        return True
    shift = 6 if found.st_uid == user.uid else 3 if found.st_gid in user.groups else 0
    return (stat.S_IMODE(found.st_mode) >> shift) & 0o6 == 0o6


def docker(site: Site) -> list[Diagnosis]:
    """Docker 28 or later needs iptable_raw to publish ports; the kernel of JetPack 6 has none."""
    if not site.jetson or site.container:
        return []
    found = site.package(r"docker-ce") or site.package(r"docker\.io")
    if found is None:
        return []
    release, name = kernel(site.root), f"{found[0]} {found[1]}"
    lists = [read_text(site.root / place, 1 << 24) or "" for place in
             (f"lib/modules/{release}/modules.dep", f"lib/modules/{release}/modules.builtin", "proc/modules")]
    if version_of(found[1]) >= (28,) and not any("iptable_raw" in text for text in lists):
        return [Diagnosis("docker", Severity.WARN, "this Docker cannot publish ports: the kernel has no iptable_raw",
                          expected="Docker below 28, or a kernel with iptable_raw", found=name,
                          fix="Use --network host or none, or install Docker 27.5")]
    return [Diagnosis("docker", Severity.OK, f"{name} and this kernel fit", found=name)]
