"""Q/DQ files as other tools write them: modelopt's plain configuration, ONNX Runtime's quantize_static, NNCF."""

from __future__ import annotations

import contextlib
import copy
import io as streams
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmdeploy.arrays import Arrays
from fmdeploy.export.variants import float_module
from fmdeploy.iospec import IOSpec
from fmdeploy.models.outputs import example_inputs
from fmdeploy.quantize import modelopt
from support.ort_static import samples_reader
from support.quantize_nets import concat, image_net, residual, samples_of, vit

SYMMETRIC = {"ActivationSymmetric": True}
FLOAT_BIAS = {"QuantizeBias": False}
# quantize_static by name; the values of the first two keys are names in QuantType and QuantFormat.
ORT: dict[str, dict[str, Any]] = {
    "u8s8": {"activation_type": "QUInt8", "weight_type": "QInt8"},
    "default": {},
    "u8u8": {"activation_type": "QUInt8", "weight_type": "QUInt8", "extra_options": FLOAT_BIAS},
    "u8-float-bias": {"activation_type": "QUInt8", "extra_options": FLOAT_BIAS},
    "symmetric": {"per_channel": True, "extra_options": SYMMETRIC},
    "symmetric-float-bias": {"per_channel": True, "extra_options": SYMMETRIC | FLOAT_BIAS},
    "trt-pairs": {"per_channel": True, "extra_options": {**SYMMETRIC, **FLOAT_BIAS, "AddQDQPairToWeight": True,
                                                         "DedicatedQDQPair": True}},
    "operators": {"quant_format": "QOperator"},
}
NNCF = ("performance", "mixed")


class Mixed(nn.Module):
    """A depthwise, a pointwise and a transposed convolution, activations that are no ReLU, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point, self.up = nn.Conv2d(8, 16, 1), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.out, self.head = nn.Conv2d(8, 4, 1), nn.Linear(4, 5)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.max_pool2d(torch.relu(self.enter(x_BCHW)), 2)
        x_BCHW = F.leaky_relu(self.point(F.relu6(self.depthwise(x_BCHW))))
        x_BCHW = self.out(torch.sigmoid(self.up(x_BCHW)))
        y_BC: Tensor = self.head(x_BCHW.mean((2, 3)))
        return y_BC


class Normalised(nn.Module):
    """A residual block whose BatchNorm nobody folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.after = nn.Conv2d(8, 4, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.max_pool2d(F.relu(self.bn0(self.stem(x_BCHW))), 2)
        x_BCHW = F.relu(x_BCHW + self.bn1(self.conv(x_BCHW)))
        y_BCHW: Tensor = self.after(x_BCHW)
        return y_BCHW


NETS: dict[str, Callable[[], tuple[nn.Module, IOSpec]]] = {
    "residual": residual, "vit": vit, "concat": concat,
    "mixed": lambda: image_net(Mixed(), outputs=((5,),)),
    "batchnorm": lambda: image_net(Normalised(), outputs=((4, 8, 8),)),
}


def net_of(name: str) -> tuple[nn.Module, IOSpec, Arrays]:
    """A network, its specification, and eight calibration samples."""
    torch.manual_seed(0)
    net, io = NETS[name]()
    return net, io, samples_of(io, 8).inputs


def float_file(name: str, folder: Path, opset: int = 17) -> Path:
    """The FP32 file of a network, BatchNorm folded."""
    net, io, _ = net_of(name)
    path = folder / f"{name}.onnx"
    _export(float_module(net, io), io, path, opset)
    return path


def modelopt_file(name: str, folder: Path, *, opset: int = 17, fold: bool = True) -> Path:
    """What `mtq.quantize(net, mtq.INT8_DEFAULT_CFG)` and the TorchScript exporter give, as it is."""
    net, io, data = net_of(name)
    path = folder / f"{name}-modelopt-{opset}.onnx"
    tensors = [torch.from_numpy(data[spec.name]) for spec in io.inputs]
    mtq = modelopt.load()
    with _quiet(), torch.no_grad():
        quantised = mtq.quantize(float_module(net, io) if fold else copy.deepcopy(net), mtq.INT8_DEFAULT_CFG,
                                 lambda module: module(*tensors))
    _export(quantised, io, path, opset)
    return path


def ort_file(name: str, kind: str, folder: Path) -> Path:
    """What ONNX Runtime's quantize_static gives with the options `ORT[kind]`."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    _, _, data = net_of(name)

    options = dict(ORT[kind])
    for key, names in (("activation_type", QuantType), ("weight_type", QuantType), ("quant_format", QuantFormat)):
        if key in options:
            options[key] = getattr(names, options[key])
    path = folder / f"{name}-ort-{kind}.onnx"
    with _quiet():
        quantize_static(str(float_file(name, folder)), str(path), samples_reader({n: a[:8] for n, a in data.items()}), **options)
    return path


def nncf_file(name: str, kind: str, folder: Path) -> Path:
    """What NNCF's post-training quantisation gives on the ONNX file with the preset `kind`."""
    with _quiet():
        import nncf

        _, _, data = net_of(name)
        dataset = nncf.Dataset([{n: a[k : k + 1] for n, a in data.items()} for k in range(8)])
        model = nncf.quantize(onnx.load(str(float_file(name, folder))), dataset, fast_bias_correction=True,
                              preset=nncf.QuantizationPreset(kind))
    path = folder / f"{name}-nncf-{kind}.onnx"
    onnx.save(model, str(path))
    return path


def samples_file(name: str, folder: Path) -> Path:
    """The calibration samples of a network as .npz."""
    path = folder / f"{name}.npz"
    np.savez(path, **net_of(name)[2])  # type: ignore[arg-type]  # its keyword arguments are the arrays
    return path


def _export(net: nn.Module, io: IOSpec, path: Path, opset: int) -> None:
    modelopt.onnx_export(net.eval(), example_inputs(io), str(path), opset_version=opset,
                         input_names=[s.name for s in io.inputs], output_names=[s.name for s in io.outputs])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Other tools warn, print and log."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(streams.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
