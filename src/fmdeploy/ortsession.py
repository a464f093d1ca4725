"""How an ONNX Runtime session is made here: one provider, asserted, and as small as it can be.

The stages that look at models and the runtime that serves them make their sessions with these lines.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fmdeploy.errors import MissingError, ModelFileError, first_line
from fmdeploy.optional import require

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
HINTS = {CUDA: "It comes with onnxruntime-gpu in place of onnxruntime; for JetPack 6 build it or take NVIDIA's wheels"}
# The GPU's memory is the CPU's on a Jetson: grow by what is asked for, not to the next power of two.
PROVIDER_OPTIONS: dict[str, dict[str, str]] = {CUDA: {"arena_extend_strategy": "kSameAsRequested"}}


def ort_session(
    model: bytes | Path, *, provider: str = CPU, threads: int = 1, optimise: bool = True, where: object = None
) -> Any:
    """Load a model into ONNX Runtime.

    Args:
        model: The file or its bytes.
        provider: The execution provider that must run it, all of it.
        threads: Of one operator; operators run one after the other.
        optimise: False runs every node as it is written: the reference for what the file means.
        where: Names the model in errors.

    Raises:
        MissingError: The provider is not available here, or onnxruntime is not installed.
        ModelFileError: ONNX Runtime refuses the model.
    """
    # From 1.29 on the library tells its vendor of its use and keeps a device id in the home folder, unless told not to.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    ort = require("onnxruntime")
    if provider not in ort.get_available_providers():
        raise MissingError("this onnxruntime does not have the execution provider", where=where, expected=provider,
                           found=", ".join(ort.get_available_providers()), fix=HINTS.get(provider))
    source = str(model) if isinstance(model, Path) else model
    try:
        session = ort.InferenceSession(source, _options(ort, provider, threads, optimise), providers=[provider],
                                       provider_options=[PROVIDER_OPTIONS.get(provider, {})])
    except Exception as error:  # onnxruntime's own exception classes are private and differ between versions
        text = first_line(error)[:160]
        raise ModelFileError(f"ONNX Runtime refuses the model: {text}", where=where) from error
    if session.get_providers()[0] != provider:
        raise MissingError("onnxruntime chose another execution provider", where=where, expected=provider,
                           found=session.get_providers()[0])
    return session


def _options(ort: Any, provider: str, threads: int, optimise: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Bytes that carry the mark of ONNX Runtime's own format would be read as that, not as the ONNX file they also are.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if provider != CPU:
        # Without this a missing kernel moves nodes to the CPU with nothing but a log line.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options
