"""TensorRT and CUDA: which, whether they load, and whether they have code for the GPU of an Orin (SM 8.7)."""

from __future__ import annotations

import json
import re

from fmdeploy.jetson.checks.finding import Diagnosis, Severity, Site, Version, version_of
from fmdeploy.jetson.preflight import import_problem, is_installed
from fmdeploy.jetson.reading import children, read_text

FLOOR: Version = (10, 3)
# Wheels and SBSA builds without code for SM 8.7: "Target GPU SM 87 is not supported".
WITHOUT_SM87: tuple[Version, ...] = ((10, 13, 3), (10, 7, 0))
ON_PC = "a PC needs none: engines are built and run on the device"


def tensorrt_version(site: Site) -> tuple[str, str] | None:
    """Return TensorRT's version and where it is from: package, header or library; None where there is none."""
    for pattern in (r"libnvinfer\d+", r"libnvinfer-bin", r"python3-libnvinfer"):
        if found := site.package(pattern):
            return found[1].partition("-")[0], f"package {found[0]} {found[1]}"
    for header in children(site.root, "usr/include/*/NvInferVersion.h"):
        parts = [re.search(rf"#define\s+NV_TENSORRT_{part}\s+(\d+)", read_text(header) or "")
                 for part in ("MAJOR", "MINOR", "PATCH")]
        if all(parts):
            return ".".join(part[1] for part in parts if part), header.name
    library = site.library("libnvinfer.so.*.*")
    return (library.name.removeprefix("libnvinfer.so."), library.name) if library else None


def cuda_version(site: Site) -> str | None:
    """Return the CUDA toolkit's version; None where there is none."""
    raw = read_text(site.root / "usr/local/cuda/version.json")
    if raw:
        try:
            return str(json.loads(raw)["cuda"]["version"])
        except (ValueError, KeyError, TypeError):
            pass
    found = site.package(r"cuda-cudart-\d+-\d+")
    return found[1] if found else None


def tensorrt(site: Site) -> list[Diagnosis]:
    """TensorRT's version against the lowest that works."""
    found = tensorrt_version(site)
    if found is None:
        if not site.jetson:
            return [Diagnosis("tensorrt", Severity.OK, f"TensorRT is not here; {ON_PC}")]
        return [Diagnosis("tensorrt", Severity.WARN, "TensorRT is not here: only CPU tiers can serve",
                          expected="10.3 or later", found="none", fix="Run: sudo apt install nvidia-jetpack")]
    version, source = found
    if version_of(version) < FLOOR:
        return [Diagnosis("tensorrt", Severity.FAIL, "TensorRT is too old for typed networks", expected="10.3 or later",
                          found=f"{version} ({source})", fix="Flash JetPack 6.2 or 7.2")]
    return [Diagnosis("tensorrt", Severity.OK, f"TensorRT {version}", found=f"{version} ({source})")]


def tensorrt_import(site: Site) -> list[Diagnosis]:
    """Whether Python can load TensorRT: tried in a child process, which names the missing library."""
    if not site.here:
        return []
    if not is_installed("tensorrt"):
        if not site.jetson:
            return []
        return [Diagnosis("tensorrt-python", Severity.WARN, "this Python has no tensorrt: only CPU tiers can serve",
                          expected="python3-libnvinfer", found="none",
                          fix="Run: sudo apt install python3-libnvinfer; a venv needs --system-site-packages")]
    problem = import_problem("tensorrt")
    if problem:
        return [Diagnosis("tensorrt-python", Severity.FAIL, problem, fix="Install the library that is named")]
    return [Diagnosis("tensorrt-python", Severity.OK, "this Python loads tensorrt")]


def cuda(site: Site) -> list[Diagnosis]:
    """CUDA toolkit and driver library."""
    version, driver = cuda_version(site), site.library("libcuda.so*")
    text = f"CUDA {version or 'toolkit not found'}, driver library {driver.name if driver else 'not found'}"
    if not site.jetson:
        return [Diagnosis("cuda", Severity.OK, text if driver else "no NVIDIA driver: CPU tiers only", found=text)]
    if driver is None:
        fix = ("Start the container with --runtime nvidia" if site.container
               else "Run: sudo apt install nvidia-l4t-cuda, or flash anew")
        return [Diagnosis("cuda", Severity.FAIL, "CUDA is absent: the driver library libcuda.so is not here",
                          expected="libcuda.so.1", found=text, fix=fix)]
    return [Diagnosis("cuda", Severity.OK, text, found=text)]


def sm87(site: Site) -> list[Diagnosis]:
    """Whether TensorRT has kernels for SM 8.7, as far as names and versions tell."""
    if not site.jetson:
        return []
    found = tensorrt_version(site)
    if found is None:
        return []
    fix = "Install the TensorRT of this JetPack: sudo apt install tensorrt"
    split = {match[1] for path in _resources(site) if (match := re.search(r"_sm(\d+)", path))}
    if split:
        if "87" in split:
            return [Diagnosis("sm87", Severity.OK, "TensorRT's kernels for SM 8.7 are here", found="sm_87")]
        return [Diagnosis("sm87", Severity.FAIL, "TensorRT has no kernels for the GPU of an Orin", expected="sm_87",
                          found=", ".join(f"sm_{sm}" for sm in sorted(split)), fix=fix)]
    if version_of(found[0])[:3] in WITHOUT_SM87:
        return [Diagnosis("sm87", Severity.WARN, f"TensorRT {found[0]} is known in builds without SM 8.7",
                          expected="sm_87", found=found[0], fix=fix)]
    return [Diagnosis("sm87", Severity.UNKNOWN, "whether TensorRT has kernels for SM 8.7 does not show in its files",
                      expected="sm_87", found=found[0],
                      fix="Run `fmdeploy build` here: it proves the engine with the bundle's golden vectors")]


def _resources(site: Site) -> list[str]:
    places = ("usr/lib/*-linux-gnu", "usr/local/lib/python3*/dist-packages/tensorrt_libs",
              "usr/lib/python3*/dist-packages/tensorrt_libs", "usr/local/tensorrt/lib")
    return [path.name for place in places for path in children(site.root, f"{place}/libnvinfer_builder_resource_sm*")]
