"""Configuration of the `export` verb."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fmdeploy.budgets import read_budgets
from fmdeploy.config import InputPath, OutputPath, RunOnly, StageConfig
from fmdeploy.export.formats import OPSET, Rest
from fmdeploy.export.isa import CpuKind
from fmdeploy.export.lint.finding import Target
from fmdeploy.export.tensorrt.compilecheck import wanted_version

Backend = Literal["onnx", "torch-tensorrt"]


class ExportConfig(StageConfig):
    """What `export` is to do: write a bundle from `model`, spell a foreign file, or judge one (`lint`)."""

    model: InputPath | None = Field(None, description="STUDENT or QUANTIZED")
    data: InputPath | None = Field(None, description="DATASET that the student was trained on")
    out: OutputPath | None = Field(None, description="where the BUNDLE, or the lowered files, are written")
    from_onnx: InputPath | None = Field(None, description="any explicit-Q/DQ ONNX file, to spell in both INT8 dialects")
    lint: InputPath | None = Field(None, description="an ONNX file to judge; exit 1 on an error")
    int8: bool = Field(True, description="write INT8 variants; a STUDENT is calibrated on the way")
    cpu: CpuKind = Field("x86-64", description="whose INT8 kernels model.int8-cpu.onnx is spelled for; "
                         "x86-64-avx2 has no VNNI: weights that would saturate get 7 bits")
    calibration: InputPath | None = Field(None, description="with --from-onnx: .npz or .safetensors, an array an input")
    target: Annotated[Target, RunOnly()] = Field("tensorrt", description="with --lint: who is to run the file")
    budgets: InputPath | None = Field(None, description="budgets.toml for the bundle; default: modest limits")
    rest: Rest = Field("fp16", description="type of what is not INT8 in model.int8.onnx")
    verify_tensorrt: bool | None = Field(
        None, description="compile the TensorRT files with TensorRT-RTX; default: where it is installed")
    backend: Backend = Field("onnx", description="what the student becomes: a BUNDLE, or with torch-tensorrt an ENGINE "
                             "for this machine's GPU")
    opset: int = Field(OPSET, ge=17, le=20, description="ONNX operator set")
    calibration_samples: int = Field(256, ge=1, description="samples that show ranges and input statistics")
    keep_float: tuple[str, ...] = Field((), description="modules of a STUDENT to leave in float")
    golden_samples: int = Field(8, ge=1, le=256, description="samples in the golden vectors")
    parity_samples: int = Field(512, ge=1, description="held-out samples on which files are compared")
    seed: int = Field(0, ge=0, description="of the choice of calibration samples")

    def resolved(self) -> dict[str, Any]:
        """Every value that decides the result: also the limits in the budgets file, and whether a compiler checks."""
        limits = read_budgets(self.budgets).model_dump(mode="json") if self.budgets else None
        compiles = wanted_version(self.verify_tensorrt) is not None
        return {**super().resolved(), "budgets": limits, "verify_tensorrt": compiles}
