"""`export --backend torch-tensorrt`: the student compiled for a workstation's GPU, without an ONNX file in between.

It is for trying a network out where torch lives anyway. What goes to a device is the bundle: this file needs torch to
run, has no INT8, and belongs to one machine.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from torch import Tensor, nn

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ConfigError, MissingError
from fmdeploy.export.config import ExportConfig
from fmdeploy.export.parity import Predict, compare, outputs_of, require_parity
from fmdeploy.iospec import IOSpec
from fmdeploy.manifest import Kind
from fmdeploy.models.outputs import predictor
from fmdeploy.models.saved import RECIPE, LoadedModel, load_model, require_heads
from fmdeploy.optional import require
from fmdeploy.progress import say
from fmdeploy.quantize.build import tracing_example
from fmdeploy.quantize.quantize import require_same_data
from fmdeploy.quantize.scores import held_out_splits
from fmdeploy.quantize.trace import as_tuple
from fmdeploy.subset import subset
from fmdeploy.task import Arrays

ENGINE = "engine.ep"  # an exported program that holds TensorRT engines


def write_torch_engine(config: ExportConfig) -> Artifact:
    """Compile a STUDENT in FP16 and keep it only if it answers as the student does.

    Raises:
        ConfigError: it is no STUDENT, or a path is missing.
        MissingDependencyError: torch-tensorrt is not installed.
        MissingError: there is no GPU here.
        GateError: the engine does not compute what the student does.
    """
    if config.model is None or config.data is None or config.out is None:
        raise ConfigError("an engine needs a model, the data it was trained on, and a place", where="export",
                          expected="--model, --data and --out")
    compiler = require("torch_tensorrt")
    torch = require("torch")
    if not torch.cuda.is_available():
        raise MissingError("torch-tensorrt compiles for the GPU it runs on, and there is none here",
                           fix="Leave --backend out: the bundle is built on the device with fmdeploy build")
    model, data = open_artifact(config.model, Kind.STUDENT), open_dataset(config.data)
    require_same_data(model, data)
    return produce(config.out, Kind.ENGINE, stage="export", config=config,
                   inputs={"model": model, "data": data.artifact},
                   build=lambda draft: _build(draft, config, compiler, model, data))


def _build(draft: Draft, config: ExportConfig, compiler: Any, artifact: Artifact, data: Dataset) -> None:
    loaded = require_heads(load_model(artifact), artifact.root)
    compiled = compile_half(compiler, loaded.module, loaded.task.io)
    samples = subset(loaded.task.samples(data, held_out_splits(data)[-1]), config.parity_samples)
    said = outputs_of(_on_gpu(compiled, loaded.task.io), samples, loaded.task)
    wanted = outputs_of(predictor(loaded.module, loaded.task.io), samples, loaded.task)
    parity = compare("fp16", said, "torch", wanted, loaded.task)
    say(str(parity))
    require_parity(parity)
    _save(draft, compiler, compiled, loaded)
    draft.write_json("metrics.json", {"backend": "torch-tensorrt", "parity": parity.to_json()})
    draft.write_text(RECIPE, artifact.path(RECIPE).read_text(encoding="utf-8"))


def compile_half(compiler: Any, student: nn.Module, io: IOSpec) -> Any:
    """Compile a module with FP16 kernels for this machine's GPU; returns a module on it.

    Args:
        compiler: `torch_tensorrt`.
        student: The float module; takes the inputs of `io` positionally.
        io: Names and shapes; batch is 1 and static.
    """
    torch = require("torch")
    example = tuple(tensor.cuda() for tensor in tracing_example(io))
    program = torch.export.export(HalfInside(student).eval().cuda(), example)
    # Types come from the graph: builder flags for precision are gone in TensorRT 11.
    return compiler.dynamo.compile(program, arg_inputs=example, use_explicit_typing=True)


class HalfInside(nn.Module):
    """A module in FP16 between FP32 inputs and outputs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).half()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Cast, run, cast back: (B, ...) float32 to (B, ...) float32."""
        return tuple(found.float() for found in as_tuple(self.module(*(x.half() for x in inputs))))


def _save(draft: Draft, compiler: Any, compiled: Any, loaded: LoadedModel) -> None:
    example = [tensor.cuda() for tensor in tracing_example(loaded.task.io)]
    compiler.save(compiled, str(draft.path(ENGINE)), arg_inputs=example)


def _on_gpu(module: Any, io: IOSpec) -> Predict:
    """A predictor that feeds a batch-1 module sample by sample."""
    torch = require("torch")

    def predict(inputs: Arrays) -> Arrays:
        rows = []
        for k in range(len(inputs[io.inputs[0].name])):
            feeds = [torch.from_numpy(np.ascontiguousarray(inputs[spec.name][k : k + 1])).cuda() for spec in io.inputs]
            with torch.no_grad():
                found = module(*feeds)
            rows.append(as_tuple(found))
        return {spec.name: np.concatenate([row[i].float().cpu().numpy() for row in rows])
                for i, spec in enumerate(io.outputs)}

    return predict
