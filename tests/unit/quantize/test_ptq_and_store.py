"""Quantised students: accurate enough, and restored bit by bit without pickle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fmdeploy.errors import InputError, ModelFileError
from fmdeploy.evaluate.sqnr import finite_db, sqnr_db
from fmdeploy.iospec import IOSpec
from fmdeploy.models.outputs import input_list
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.build import rebuild, tracing_example
from fmdeploy.quantize.placement import Request
from fmdeploy.quantize.ptq import QuantisedStudent, ptq
from fmdeploy.quantize.store import load_state, save_state
from fmdeploy.quantize.trace import as_tuple
from support.quantize_nets import NETS, Residual, image_net, samples_of


def _quantised(case: str) -> tuple[nn.Module, IOSpec, QuantisedStudent]:
    torch.manual_seed(0)
    net, io = NETS[case]()
    return net, io, ptq(net, io, samples_of(io))


@pytest.mark.parametrize("case", NETS)
def test_int8_stays_close_to_float(case: str) -> None:
    net, io, quantised = _quantised(case)
    inputs = input_list(io, {k: torch.from_numpy(v) for k, v in samples_of(io, seed=5).inputs.items()})
    with torch.no_grad():
        for before, after in zip(as_tuple(net(*inputs)), as_tuple(quantised.module(*inputs)), strict=True):
            ratio = sqnr_db(before.numpy(), after.numpy())
            assert 25 < ratio < 80, f"{ratio:.1f} dB: too much noise, or nothing was quantised"


@pytest.mark.parametrize("case", NETS)
def test_restoring_is_bit_exact_and_needs_no_pickle(case: str, tmp_path: Path) -> None:
    net, io, quantised = _quantised(case)
    path = tmp_path / "q.safetensors"
    save_state(path, quantised.module)
    assert b"pickle" not in path.read_bytes()[:4096]
    torch.manual_seed(99)
    other = type(net)((8, 12), 5, 8, stem_width=16, width=16) if case == "bev" else type(net)()
    restored = rebuild(other, tracing_example(io), quantised.placement)
    load_state(path, restored)
    inputs = input_list(io, {k: torch.from_numpy(v) for k, v in samples_of(io, seed=7).inputs.items()})
    with torch.no_grad():
        pairs = zip(as_tuple(quantised.module(*inputs)), as_tuple(restored.eval()(*inputs)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_saving_twice_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_state(tmp_path / name, _quantised("residual")[2].module)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_weights_of_another_student_are_refused(tmp_path: Path) -> None:
    _, io, quantised = _quantised("residual")
    save_state(tmp_path / "q", quantised.module)
    wide = image_net(Residual(12))[0]
    with pytest.raises(ModelFileError, match="do not fit the student"):
        load_state(tmp_path / "q", rebuild(wide, tracing_example(io), ptq(wide, io, samples_of(io)).placement))
    (tmp_path / "bad").write_bytes(b"no tensors here")
    with pytest.raises(ModelFileError, match="cannot be read as safetensors"):
        load_state(tmp_path / "bad", quantised.module)


def test_one_range_per_tensor_on_the_grid() -> None:
    """Every value behind a quantizer is a whole number of steps of amax / 127, from -128 to 127."""
    _, io, quantised = _quantised("residual")
    amax = modelopt.ranges(quantised.module)["quantizers.act_001.input_quantizer"]
    seen: list[torch.Tensor] = []
    handle = quantised.module.get_submodule("quantizers.act_001").register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        quantised.module(*tracing_example(io))
    handle.remove()
    steps = (seen[0] / (amax / 127)).numpy()
    assert np.abs(steps - np.rint(steps)).max() < 1e-3
    assert steps.min() >= -128
    assert steps.max() <= 127


def test_keep_float_reaches_the_module() -> None:
    net, io = image_net(Residual())
    kept = ptq(net, io, samples_of(io), request=Request(keep_float=("stem", "conv"), quantise_heads=True))
    assert [row.module for row in kept.placement.weights] == ["head"]
    with pytest.raises(InputError, match="no conv or linear layer that could be quantised"):
        ptq(net, io, samples_of(io), request=Request(keep_float=("stem", "conv")))


def test_sqnr_has_its_definition_and_its_edges() -> None:
    reference = np.array([3.0, 4.0])
    assert sqnr_db(reference, reference + np.array([0.3, 0.4])) == pytest.approx(20)
    assert sqnr_db(reference, reference) == np.inf
    assert sqnr_db(reference, np.array([np.nan, 4])) == -np.inf
    assert sqnr_db(np.zeros(2), np.ones(2)) == -np.inf
    assert (finite_db(np.inf), finite_db(-np.inf), finite_db(12.5)) == (999.0, -999.0, 12.5)
