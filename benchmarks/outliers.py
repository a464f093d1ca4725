"""What outlier channels cost in INT8, and what the outlier probe sees of them: the table behind its threshold.

Channels are planted by scaling them up by `factor` where they are written and down again where they are read: the
float network computes the same, its tensors do not. Two networks: the built-in vision transformer (behind every
LayerNorm) and the built-in CNN (the residual stream of its first stage). A row holds what the probe measured of the
worst planted tensor and the SQNR of the outputs against float with that tensor's readers in INT8 and in float.

    python benchmarks/outliers.py
"""

# B batch, C channels

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from fmdeploy.models.bev_cnn import BevCnn
from fmdeploy.models.bev_vit import BevVit
from fmdeploy.quantize import modelopt, outliers
from fmdeploy.quantize.build import apply, probed_placement
from fmdeploy.quantize.placement import Placement, Request
from fmdeploy.quantize.samples import CalibrationSet
from fmdeploy.quantize.trace import as_tuple, float_graph

NAMES = ["lidar", "camera"]
FACTORS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PLANTED = 2  # channels


def samples(seed: int, count: int = 16) -> CalibrationSet:
    """Sparse positive grids, as a bird's-eye view has them."""
    rng = np.random.default_rng(seed)
    inputs = {name: (rng.random((count, c, 64, 64)) * (rng.random((count, c, 64, 64)) < 0.2)).astype(np.float32)
              for name, c in zip(NAMES, (8, 12), strict=True)}
    return CalibrationSet(tuple(f"{k:03d}" for k in range(count)), inputs, "0" * 64, seed)


def settled(net: nn.Module) -> nn.Module:
    """`net` with BatchNorm statistics of such data, in evaluation mode."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    with torch.no_grad():
        for step in range(20):
            net.train()(*samples(step).tensors(NAMES))
    return net.eval()


@torch.no_grad()
def plant_in_vit(net: nn.Module, factor: float) -> None:
    """Behind every LayerNorm of the encoder; the Linear layers that read it undo it."""
    for name, module in net.named_modules():
        if name.endswith(("norm1", "norm2")):
            block = net.get_submodule(name.rpartition(".")[0])
            attention = [f"attention.{n}_proj" for n in "qkv"]
            _scale(module, [block.get_submodule(r) for r in (attention if name.endswith("1") else ["mlp.fc1"])], factor)


@torch.no_grad()
def plant_in_cnn(net: nn.Module, factor: float) -> None:
    """In the residual stream at quarter resolution: every BatchNorm that writes it, every layer that reads it."""
    blocks = [net.get_submodule(f"trunk.{k}") for k in (1, 2)]
    writers = [net.get_submodule("trunk.0.1"), *(block.get_submodule("second.1") for block in blocks)]
    readers = [*(block.get_submodule("first.0") for block in blocks), net.get_submodule("lateral.0"),
               net.get_submodule("scene")]
    for writer in writers:
        _scale(writer, [], factor)
    _scale(nn.Identity(), readers, factor)


def _scale(writer: nn.Module, readers: list[nn.Module], factor: float) -> None:
    for parameter in writer.parameters():
        parameter[:PLANTED] *= factor
    for reader in readers:
        reader.get_parameter("weight")[:, :PLANTED] /= factor


def sqnr_db(net: nn.Module, request: Request, held: bool) -> tuple[float, Placement]:
    """Smallest SQNR of the outputs of the max-calibrated INT8 network, and its placement."""
    calibration_set, test = samples(100), samples(200)
    graph = float_graph(net, calibration_set.tensors(NAMES, slice(0, 1)))
    threshold, outliers.MIN_READER_DB = outliers.MIN_READER_DB, outliers.MIN_READER_DB if held else -1e9
    try:
        placement = probed_placement(graph, calibration_set, NAMES, request)
    finally:
        outliers.MIN_READER_DB = threshold
    module = apply(graph, placement)
    with torch.no_grad():
        modelopt.calibrate(module, lambda m: m(*calibration_set.tensors(NAMES)))
        pairs = zip(as_tuple(net(*test.tensors(NAMES))), as_tuple(module(*test.tensors(NAMES))), strict=True)
        return min(float(10 * torch.log10(a.square().sum() / (a - b).square().sum())) for a, b in pairs), placement


def rows(make: Callable[[], nn.Module], plant: Callable[[nn.Module, float], None], kept: tuple[str, ...]
         ) -> Iterator[tuple[float, ...]]:
    """One row a factor: factor, max/rms, max/p99.9, reader dB, SQNR in INT8, with `kept` in float, with the probe."""
    torch.manual_seed(0)
    net = settled(make())
    for factor in FACTORS:
        planted = copy.deepcopy(net)
        plant(planted, factor)
        int8, placement = sqnr_db(planted, Request(), held=False)
        in_float, _ = sqnr_db(planted, Request(keep_float=kept), held=False)
        probed, after = sqnr_db(planted, Request(), held=True)
        worst = min(placement.measured, key=lambda row: row.reader_db)
        yield (factor, worst.max / worst.rms, worst.max / worst.p999, worst.reader_db, int8, in_float, probed,
               len(placement.weights) - len(after.weights))


def main() -> None:
    blocks = range(2)
    vit = tuple(f"backbone.encoder.dinov2.encoder.layer.{k}.{n}" for k in blocks
                for n in ("attention.q_proj", "attention.k_proj", "attention.v_proj", "mlp.fc1"))
    cnn = ("trunk.1.first.0", "trunk.2.first.0", "lateral.0", "add_1", "add_2")
    head = ("factor", "max/rms", "max/p99.9", "reader dB", "INT8 dB", "float dB", "probed dB", "layers held")
    for name, make, plant, kept in (("vit", lambda: BevVit((8, 12), 5, 8), plant_in_vit, vit),
                                    ("cnn", lambda: BevCnn((8, 12), 5, 8), plant_in_cnn, cnn)):
        print(name + " ".join(f"{h:>12}" for h in head))
        for row in rows(make, plant, kept):
            print("   " + " ".join(f"{v:12.1f}" for v in row), flush=True)


if __name__ == "__main__":
    main()
