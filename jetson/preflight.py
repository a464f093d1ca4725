"""Whether a package imports, found out where a crash costs nothing: in a child process.

TensorRT for JetPack 6 links a library that the host injects into containers; the host of JetPack 7 has none, and
`import tensorrt` dies. The missing library is named here, instead of a stack trace.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import signal
import sys

TIMEOUT_S = 120.0
MISSING_LIBRARY = re.compile(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file")
HINTS = {
    "libnvdla_compiler.so": "this TensorRT was built for JetPack 6, whose host injects that library into containers; "
                            "the host of JetPack 7 has none: use an ARM64 (SBSA) image there",
    "libnvinfer.so": "TensorRT's own libraries are not on the library path: install libnvinfer, on Jetson from JetPack",
    "libcuda.so": "the GPU's driver is not visible: in a container start it with --runtime nvidia",
    "libcudart.so": "the CUDA runtime is not on the library path: install it, on Jetson from JetPack",
}


def is_installed(package: str) -> bool:
    """Whether the package can be found; it is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


@functools.lru_cache(maxsize=16)
def import_problem(package: str) -> str:
    """Import a package in a child process.

    Returns:
        Why it does not import, one line, with the missing shared library and what to do where one is named; empty
        where it imports.
    """
    import subprocess  # late: a start that asks nothing must not pay for it

    command = [sys.executable, "-c", f"import {package}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)})
    except subprocess.TimeoutExpired:
        return f"importing {package} takes longer than {TIMEOUT_S:g} s"
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"importing {package} ends in {signal.Signals(-done.returncode).name}"
    return _diagnosis(package, done.stderr)


def _diagnosis(package: str, stderr: str) -> str:
    if found := MISSING_LIBRARY.search(stderr):
        hint = next((hint for name, hint in HINTS.items() if found[1].startswith(name)), "install what provides it")
        return f"{package} does not import: the shared library {found[1]} is missing; {hint}"
    last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "without a message")
    return f"{package} does not import: {last[:200]}"
