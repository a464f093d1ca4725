"""`fmdeploy estimate`: how long a model will take on a device that is not here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fmdeploy.artifact import open_artifact
from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath, OutputPath, Positional, StageConfig
from fmdeploy.errors import ConfigError, ModelFileError
from fmdeploy.estimate.calibrate import calibrate
from fmdeploy.estimate.cpu import CPU_RULES, THIS_CPU, this_cpu_device
from fmdeploy.estimate.devices import Device, device
from fmdeploy.estimate.fromonnx import Workload, read_work
from fmdeploy.estimate.fusion import TENSORRT
from fmdeploy.estimate.roofline import Layer, Prediction, predict
from fmdeploy.estimate.work import Precision
from fmdeploy.manifest import MANIFEST_NAME, Kind

SHOWN = 8  # kernels that the text names
FILES = {"fp32": ("fp32",), "fp16": ("fp16", "fp32"), "int8": ("int8", "int8-cpu")}  # of a bundle, the best one first


class EstimateConfig(StageConfig):
    """What to predict."""

    file: Annotated[InputPath | None, Positional()] = Field(default=None, description="An ONNX file or a bundle")
    device: str = Field(description="A built-in device such as orin-nano-super, this-cpu, or a device file (.toml)")
    power_mode: str | None = Field(default=None, description="Power mode of the device, such as 15W")
    precision: Precision = Field(default="fp16", description="Precision that the engine is built with")
    batch: int | None = Field(default=None, ge=1, le=65536, description="Samples a call; without it, as the file says")
    calibrate: InputPath | None = Field(
        default=None, description="CSV (file,precision,batch,ms) measured on your board: refit instead of predicting")
    out: OutputPath | None = Field(default=None, description="Device file to write, with --calibrate")


@command(EstimateConfig)
def estimate(config: EstimateConfig) -> Outcome:
    """Predict the latency of an ONNX file or a bundle on a device, with a band that says how far to trust it.

    The engine's time alone: no pre- or post-processing, no copies, locked clocks, nothing else running. With
    --calibrate the model is fitted to latencies that you measured, and --out gets a device file to use instead.

    Raises:
        ConfigError: the device, mode or CSV is not known or not valid.
        ModelFileError: the file is no usable ONNX model.
    """
    _require_one_purpose(config)
    if config.calibrate is not None:
        return calibrate(config.calibrate, config.device, config.power_mode, config.out)
    assert config.file is not None
    path = model_file(config.file, config.precision, config.device)
    on = _device(config)
    work = read_work(path, TENSORRT if config.device != THIS_CPU else CPU_RULES[config.precision])
    batch = config.batch or work.batch
    prediction = predict(work.rows, on, config.precision, batch)
    notes = tuple(_notes(work, prediction, on, config.precision, batch))
    return Outcome(tuple(_lines(path, on, config.precision, batch, prediction, notes)),
                   _data(path, on, config.precision, batch, prediction, notes))


def _require_one_purpose(config: EstimateConfig) -> None:
    if config.file is None and config.calibrate is None:
        raise ConfigError("name an ONNX file or a bundle", fix="Or give --calibrate measured.csv --out device.toml")
    if config.file is not None and config.calibrate is not None:
        raise ConfigError("--calibrate refits a device and predicts nothing", found=f"the file {config.file}, too",
                          fix="Run it without the file, then estimate with --device and the file it wrote")
    if config.out is not None and config.calibrate is None:
        raise ConfigError("--out is where --calibrate writes a device file", fix="Leave it out, or add --calibrate")


def model_file(path: Path, precision: Precision, on: str) -> Path:
    """The ONNX file itself, or the one of a bundle for this precision.

    Raises:
        ArtifactError: the folder is not a whole bundle.
        ModelFileError: the bundle has no file of this precision.
    """
    if not path.is_dir() and path.name != MANIFEST_NAME:
        return path
    bundle = open_artifact(path if path.is_dir() else path.parent, Kind.BUNDLE)
    names = ("int8-cpu",) if precision == "int8" and on == THIS_CPU else FILES[precision]
    for name in names:
        if bundle.has(f"model.{name}.onnx"):
            return bundle.path(f"model.{name}.onnx")
    raise ModelFileError(f"the bundle has no {precision} model", where=path, expected=f"model.{names[0]}.onnx",
                         fix="Choose another --precision, or export it")


def _device(config: EstimateConfig) -> Device:
    if config.device != THIS_CPU:
        return device(config.device, config.power_mode)
    if config.power_mode is not None:
        raise ConfigError("this-cpu has no power modes", found=config.power_mode)
    if config.precision == "fp16":
        raise ConfigError("ONNX Runtime has no FP16 kernels here", expected="--precision fp32 or int8")
    return this_cpu_device(config.precision)


def _notes(work: Workload, prediction: Prediction, on: Device, precision: Precision, batch: int) -> Iterator[str]:
    if precision == "int8" and not work.quantised:
        yield "the file has no Q/DQ pairs: every convolution and linear layer is counted as INT8"
    if precision != "int8" and work.quantised:
        yield f"the Q/DQ pairs of the file are ignored: everything is counted as {precision.upper()}"
    if precision == "fp32" and on.clock_mhz is not None:
        yield "FP32 is TF32, as TensorRT builds it by default; fmdeploy build keeps all 24 bits, which is slower"
    if not work.dynamic and batch != work.batch:
        yield f"the file has a fixed batch of {work.batch}; its work is scaled to {batch}"
    if work.unknown:
        listed = ", ".join(f"{op} ×{count}" for op, count in work.unknown)
        yield f"counted by their memory traffic only: {listed}"
    if prediction.widened > 1.001:
        seen = on.constants.seen_gmac
        yield f"outside the sizes of the fit ({seen.low:g} to {seen.high:g} GMAC a call): the band is wider"
    if prediction.like == "transformer":
        yield "transformer-like: few such networks were published, so the band is wider"
    if on.confidence in ("reported", "unverified"):
        yield f"the clocks of {on.name} in mode {on.mode} are {on.confidence}"


def _lines(path: Path, on: Device, precision: Precision, batch: int, prediction: Prediction,
           notes: tuple[str, ...]) -> Iterator[str]:
    yield (f"{path.name} on {on.name} ({on.mode}), {precision.upper()}, batch {batch}: {prediction.p50_ms:.3f} ms "
           f"(band {prediction.low_ms:.3f} to {prediction.high_ms:.3f}), predicted, not measured")
    bounds = {kind: sum(layer.ms for layer in prediction.layers if layer.bound == kind)
              for kind in ("compute", "memory", "launch")}
    yield f"  {len(prediction.layers)} kernels: " + ", ".join(
        f"{ms / prediction.p50_ms:.0%} in kernels bound by {kind}" for kind, ms in bounds.items())
    for layer in sorted(prediction.layers, key=lambda one: -one.ms)[:SHOWN]:
        yield f"  {layer.ms:8.4f} ms  {layer.precision}  {layer.work.kind:10} {layer.bound:8} {layer.work.name}"
    yield from (f"  note: {note}" for note in notes)


def _data(path: Path, on: Device, precision: Precision, batch: int, prediction: Prediction,
          notes: tuple[str, ...]) -> dict[str, Any]:
    return {"p50_ms": prediction.p50_ms, "low_ms": prediction.low_ms, "high_ms": prediction.high_ms,
            "layers": [_row(layer) for layer in prediction.layers], "file": str(path), "device": on.name,
            "power_mode": on.mode, "precision": precision, "batch": batch, "confidence": on.confidence,
            "macs": sum(layer.work.macs for layer in prediction.layers), "notes": list(notes)}


def _row(layer: Layer) -> dict[str, Any]:
    work = layer.work
    return {"name": work.name, "kind": work.kind, "precision": layer.precision, "ms": layer.ms, "bound": layer.bound,
            "macs": work.macs, "weights": work.weights, "reads": work.reads, "writes": work.writes}
