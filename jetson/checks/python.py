"""Python and ONNX Runtime: versions, known holes, and the providers that can really run a model here."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata

from fmdeploy.cpu import this_cpu
from fmdeploy.jetson.checks.finding import Diagnosis, Severity, Site, Version, version_of
from fmdeploy.jetson.reading import children

PYTHON: Version = (3, 10)
CLOSED: Version = (1, 24, 4)  # first release that refuses external data outside of the model's folder
NAMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")
ASK = "import json, onnxruntime; print(json.dumps(onnxruntime.get_available_providers()))"
TIMEOUT_S = 60.0


def python(site: Site) -> list[Diagnosis]:
    """Python's version; ONNX Runtime for JetPack 6 depends on it."""
    version = platform.python_version() if site.here else _python_below(site)
    if version is None:
        return [Diagnosis("python", Severity.UNKNOWN, "no Python is below the root", expected="3.10 or later",
                          fix="Run the doctor on that machine")]
    if version_of(version) < PYTHON:
        return [Diagnosis("python", Severity.FAIL, "Python is too old", expected="3.10 or later", found=version,
                          fix="Use the Python of Ubuntu 22.04 (JetPack 6) or 24.04 (JetPack 7)")]
    return [Diagnosis("python", Severity.OK, f"Python {version}", found=version)]


def _python_below(site: Site) -> str | None:
    names = [path.name.removeprefix("python") for path in children(site.root, "usr/bin/python3.*")]
    versions = [name for name in names if name.replace(".", "").isdigit()]
    return max(versions, key=version_of, default=None)


def onnxruntime(site: Site) -> list[Diagnosis]:
    """ONNX Runtime's version, and what it lets a model file do."""
    found = _installed() if site.here else _below(site)
    if not found:
        here = Severity.FAIL if site.here else Severity.UNKNOWN
        return [Diagnosis("onnxruntime", here, "ONNX Runtime is not installed", expected="1.23 or later",
                          fix="Run: pip install onnxruntime")]
    notes = []
    for name, version in found.items():
        if version_of(version) < CLOSED:
            text = f"{name} {version} reads external data from anywhere and can be crashed by a model"
            old = version_of(platform.python_version()) < (3, 11) if site.here else True
            fix = ("JetPack 6 (Python 3.10) has no later wheel: fmdeploy checks every model before ONNX Runtime sees "
                   "it; run no other models" if old else "Run: pip install --upgrade onnxruntime")
            notes.append(Diagnosis("onnxruntime", Severity.WARN, text, "1.24.4 or later", version, fix))
        else:
            notes.append(Diagnosis("onnxruntime", Severity.OK, f"{name} {version}", found=version))
        if name == "onnxruntime-gpu" and site.jetson:
            text = "the onnxruntime-gpu wheels of PyPI have no code for an Orin's GPU"
            fix = "Use TensorRT tiers, or a wheel that was built for this JetPack"
            notes.append(Diagnosis("onnxruntime", Severity.WARN, text, "sm_87", f"{name} {version}", fix))
    return notes


def _installed() -> dict[str, str]:
    found = {}
    for name in NAMES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _below(site: Site) -> dict[str, str]:
    found = {}
    for place in ("usr/lib/python3*/dist-packages", "usr/local/lib/python3*/dist-packages",
                  "usr/local/lib/python3*/site-packages", "opt/*/lib/python3*/site-packages"):
        for path in children(site.root, f"{place}/onnxruntime*.dist-info"):
            name, _, version = path.name.removesuffix(".dist-info").partition("-")
            found[name.replace("_", "-")] = version
    return found


def providers(site: Site) -> list[Diagnosis]:
    """Execution providers that ONNX Runtime really has; asked in a child process, which may crash."""
    if not site.here:
        return [Diagnosis("providers", Severity.UNKNOWN, "another machine's ONNX Runtime cannot be asked from here",
                          fix="Run the doctor on that machine")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, timeout=TIMEOUT_S,
                              check=False, env=environment)
        names = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, OSError, ValueError):
        return [Diagnosis("providers", Severity.FAIL, "ONNX Runtime does not import here",
                          fix="Run: python3 -c 'import onnxruntime'")]
    return [Diagnosis("providers", Severity.OK, f"ONNX Runtime has {', '.join(names)}", found=", ".join(names))]


def processor(site: Site) -> list[Diagnosis]:
    """Which 8-bit multiply the processor has: without VNNI, INT8 on x86 saturates."""
    if not site.here:
        return []
    isa = this_cpu()
    severity = Severity.OK if isa.exact_int8 else Severity.WARN
    fix = "" if isa.exact_int8 else "INT8 bundles may be refused on this processor; FP32 serves"
    return [Diagnosis("processor", severity, f"{isa}", expected="exact 8-bit products", found=str(isa), fix=fix)]
