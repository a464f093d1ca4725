"""ONNX bytes to a serialised engine, with the API module as a parameter: the one place that drives the builder.

Valid for TensorRT 10.3 to 11 and TensorRT-RTX 1.7: types come from the graph (strongly typed), Q/DQ pairs are explicit,
and no flag that a release removed is used. It runs inside a child process (`child.py`): a crash ends nothing else.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any

from fmdeploy.runtime.backends.tensorrt_api import Api, capturing_logger, complaints, one_line

MIB = 2**20
# The timing cache is bound to a device and to builder parameters: one from elsewhere is refused, not forced.
IGNORE_MISMATCH = False
# What the parser makes of Conv, ConvTranspose, Gemm, MatMul and Einsum.
COMPUTE = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM")
ONNX_NAME = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1c-\x1f]|\[ONNX Layer: |$)")  # names are joined by ASCII 0x1F
DETAILED, NO_TF32 = "profiling_verbosity=DETAILED", "no TF32"
FLAGS = ("strongly typed", DETAILED, NO_TF32)  # how every engine is built: part of its key
LAYERS = "Layers:"  # how the verbose message with the engine's layers begins


@dataclass(frozen=True)
class Options:
    """How an engine is built.

    Attributes:
        workspace_mib: Upper bound of scratch memory for one layer; None leaves the default, the whole device.
        free_dims: Smallest, best and largest value of every dynamic dimension.
        timing_cache: Kernel timings of an earlier build on the same device.
    """

    workspace_mib: int | None = None
    free_dims: tuple[int, int, int] = (1, 1, 8)
    timing_cache: bytes | None = None


@dataclass(frozen=True)
class Problem:
    """What went wrong, and where."""

    stage: str
    message: str
    node: str = ""
    op: str = ""
    code: str = ""

    def __str__(self) -> str:
        where = " ".join(part for part in (self.code, self.op, self.node) if part)
        return f"{self.stage}: {where + ': ' if where else ''}{self.message}"


@dataclass(frozen=True)
class NetworkNode:
    """One convolution or matrix product of the parsed network, by the name of its ONNX node."""

    name: str
    kind: str


@dataclass
class Built:
    """Everything one build gave."""

    version: str
    parsed: bool = False
    problems: list[Problem] = field(default_factory=list)
    nodes: list[NetworkNode] = field(default_factory=list)
    inputs: dict[str, list[int]] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    engine: bytes | None = None
    timing_cache: bytes | None = None
    seconds: float = 0.0


def build_engine(api: Api, model: bytes, options: Options) -> Built:
    """Parse and build in this process.

    Args:
        api: `tensorrt` or `tensorrt_rtx`.
        model: A single-file ONNX model; its bytes were verified before.
        options: Limits and shapes.

    Returns:
        What was built; `engine` is None and `problems` says why where nothing was.
    """
    started = time.monotonic()
    log = capturing_logger(api)
    built = Built(api.version)
    try:
        _build(api, model, options, log, built)
    except Exception as error:  # whatever the bindings raise (TypeError, RuntimeError, their own) is a failed build
        built.problems.append(Problem("api", f"{type(error).__name__}: {one_line(str(error))}"))
    if built.engine is None:
        stage = "build" if built.parsed else "parse"
        built.problems += [] if any(p.stage == stage for p in built.problems) else [
            Problem(stage, text) for text in complaints(log.messages)] or [Problem(stage, "failed without a message")]
    built.layers = [text for severity, text in log.messages if severity == "VERBOSE" and text.startswith(LAYERS)]
    built.seconds = round(time.monotonic() - started, 3)
    return built


def _build(api: Api, model: bytes, options: Options, log: Any, built: Built) -> None:
    trt = api.module
    builder = trt.Builder(log)
    network = builder.create_network(network_flags(trt, built.flags))
    parser = trt.OnnxParser(network, log)
    parsed = bool(parser.parse(model))
    built.problems += [_parser_problem(parser.get_error(k)) for k in range(parser.num_errors)]
    if parsed and not network.num_outputs:  # what bytes that are no ONNX model can give
        built.problems.append(Problem("parse", "the network has no outputs: is this an ONNX model?"))
    if built.problems or not parsed:
        return
    built.parsed = True
    built.nodes = network_nodes(network)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    built.flags.append(DETAILED)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; FP32 in the graph is to mean 24 bits, not 11
    built.flags.append(NO_TF32)
    _limit_workspace(trt, config, options, built)
    config.add_optimization_profile(_profile(builder, network, options, built))
    cache = _use_timing_cache(config, options, built)
    engine = builder.build_serialized_network(network, config)
    if engine is not None:
        built.engine = bytes(engine)
        built.timing_cache = bytes(cache.serialize()) if cache is not None else None


def network_flags(trt: Any, said: list[str]) -> int:
    """Flags of `create_network`: strong typing where it is still a choice (10.x), nothing where it is the rule (11)."""
    flags = 0
    for name in ("STRONGLY_TYPED", "EXPLICIT_BATCH"):
        if hasattr(trt.NetworkDefinitionCreationFlag, name):
            flags |= 1 << int(getattr(trt.NetworkDefinitionCreationFlag, name))
            said.append(name)
    return flags


def network_nodes(network: Any) -> list[NetworkNode]:
    """Every convolution and matrix product of a parsed network."""
    nodes = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = str(layer.type).rsplit(".", 1)[-1]
        if kind in COMPUTE:
            names = ONNX_NAME.findall(layer.metadata or "") or [layer.name]
            nodes.append(NetworkNode(names[0], kind))
    return nodes


def _parser_problem(error: Any) -> Problem:
    return Problem("parse", one_line(error.desc()), error.node_name(), error.node_operator(),
                   str(error.code()).rsplit(".", 1)[-1])


def _limit_workspace(trt: Any, config: Any, options: Options, built: Built) -> None:
    if options.workspace_mib is None:
        return
    wanted, pool = options.workspace_mib * MIB, trt.MemoryPoolType.WORKSPACE
    config.set_memory_pool_limit(pool, wanted)
    if (found := config.get_memory_pool_limit(pool)) != wanted:  # out-of-range values are ignored without an exception
        raise ValueError(f"the workspace limit of {wanted} bytes was not taken: it is {found}")
    built.flags.append(f"workspace_mib={options.workspace_mib}")


def _profile(builder: Any, network: Any, options: Options, built: Built) -> Any:
    """One optimisation profile for all inputs; of static ones, all three shapes are the same."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            raise ValueError(f"input {tensor.name!r} is a shape tensor: fix its value in the graph first")
        dims = tuple(tensor.shape)
        built.inputs[tensor.name] = list(dims)
        shapes = [tuple(free if size < 0 else size for size in dims) for free in options.free_dims]
        profile.set_shape(tensor.name, *shapes)
    return profile


def _use_timing_cache(config: Any, options: Options, built: Built) -> Any:
    cache = config.create_timing_cache(options.timing_cache or b"")
    if cache is None or not config.set_timing_cache(cache, IGNORE_MISMATCH):
        if options.timing_cache:  # of another device or version: start an empty one
            return _use_timing_cache(config, Options(), built)
        return None
    built.flags.append("timing_cache")
    return cache
