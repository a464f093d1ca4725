"""What an artifact was made with. It goes into the manifest, outside the digest."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

import fmdeploy

PACKAGES = ("torch", "nvidia-modelopt", "onnx", "onnxruntime", "onnxsim", "transformers", "accelerate", "numpy",
            "highway-env", "tensorrt", "tensorrt-rtx-cu12")


def describe_environment() -> dict[str, Any]:
    """Versions of fmdeploy, Python and the packages that matter, and the processor."""
    return {
        "fmdeploy": fmdeploy.__version__,
        "python": platform.python_version(),
        "packages": package_versions(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor_name(),
        "num_cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
    }


def package_versions() -> dict[str, str]:
    """Installed versions, without importing anything."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor_name() -> str:
    """The model name that the kernel gives, or the architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            for line in stream:
                if line.lower().startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()
