"""Training quantizers: the same grid as modelopt's, the gradient of LSQ, and ranges that come back on the grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fmdeploy.quantize import modelopt
from fmdeploy.quantize.grid import fp16_amax
from fmdeploy.quantize.learned import RATE, TrainingQuantizer, training_quantizers
from fmdeploy.quantize.ptq import ptq
from support.quantize_nets import residual, samples_of

PER_CHANNEL = torch.tensor([0.7, 2.0, 1e-3]).reshape(3, 1, 1)


def _values(shape: tuple[int, ...], size: float = 1.5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * size


@pytest.mark.parametrize("amax", [torch.tensor(2.0), PER_CHANNEL])
@pytest.mark.parametrize("learn", [False, True])
def test_values_are_the_nearest_of_256_steps(amax: Tensor, learn: bool) -> None:
    x, scale = _values((3, 4, 5)), amax / 127
    found = TrainingQuantizer(amax, learn=learn)(x)
    wanted = torch.clamp(torch.round(x / scale), -128, 127) * scale
    assert torch.allclose(found, wanted, atol=0, rtol=1e-6)


@pytest.mark.parametrize("amax", [torch.tensor(2.0), PER_CHANNEL])
def test_the_gradient_of_the_scale_is_that_of_lsq(amax: Tensor) -> None:
    """arXiv:1902.08153, equation 3, summed against the gradient from above, times 1 / sqrt(127 N)."""
    x = _values((3, 4, 5)).requires_grad_()
    above = _values((3, 4, 5), 1.0)
    quantizer = TrainingQuantizer(amax, learn=True)
    (quantizer(x) * above).sum().backward()
    scale = (amax / 127).expand(3, 1, 1)
    steps = x.detach() / scale
    inside = (torch.round(steps) >= -128) & (torch.round(steps) <= 127)
    slope = torch.where(inside, torch.round(steps) - steps, steps.sign() * 127.5 - 0.5)
    per_channel = (slope * above).sum((1, 2))
    count = 20  # elements of a channel, and of one sample
    wanted = (per_channel if amax.numel() == 3 else per_channel.sum()[None]) / (127 * count) ** 0.5
    wanted = wanted * (amax / 127).flatten() * RATE  # theta is RATE times smaller, and logarithmic
    assert quantizer.theta_C is not None
    assert quantizer.theta_C.grad is not None
    assert torch.allclose(quantizer.theta_C.grad, wanted, rtol=1e-4, atol=1e-7)
    assert x.grad is not None
    assert torch.equal(x.grad != 0, inside & (above != 0))
    assert torch.allclose(x.grad[inside], above[inside])


def test_outside_the_range_the_gradient_is_the_finite_difference() -> None:
    """Where everything is clipped, the output is a smooth function of the range: no estimate is needed."""
    x = torch.full((2, 8), 9.0)
    quantizer = TrainingQuantizer(torch.tensor(2.0), learn=True)
    theta = quantizer.theta_C
    assert theta is not None
    quantizer(x).sum().backward()
    assert theta.grad is not None
    sums = []
    for shift in (-1e-3, 1e-3):
        with torch.no_grad():
            theta.fill_(shift)
            sums.append(float(quantizer(x).sum()))
    slope = (sums[1] - sums[0]) / 2e-3
    assert float(theta.grad[0]) * (127 * 8) ** 0.5 == pytest.approx(slope, rel=1e-3)


def test_ranges_move_towards_less_error() -> None:
    """A range that is far too wide shrinks when the error is what is minimised."""
    x = _values((16, 64), 0.02)
    quantizer = TrainingQuantizer(torch.tensor(2.0), learn=True)
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=1e-2)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        error = (quantizer(x) - x).square().mean()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < errors[0] / 20
    assert float(quantizer.amax) < 0.3


@pytest.mark.parametrize("learn", [False, True])
def test_modelopts_quantizers_return_with_the_ranges_on_the_grid(learn: bool) -> None:
    net, io = residual()
    made = ptq(net, io, samples_of(io))
    x = samples_of(io, seed=4).tensors(["x0"])
    before, ranges = made.module(*x), modelopt.ranges(made.module)
    with training_quantizers(made.module, learn=learn) as stand_ins:
        assert set(stand_ins) == set(ranges)
        during = made.module(*x)
        names = [name for name, _ in made.module.named_parameters() if "theta" in name]
        assert len(names) == (len(ranges) if learn else 0)
        if learn:
            for parameter in (p for n, p in made.module.named_parameters() if "theta" in n):
                parameter.data.add_(0.01)
    assert torch.allclose(before, during, atol=1e-4)  # a last bit may put a value on the next step
    after = modelopt.ranges(made.module)
    for name, amax in after.items():
        wanted = fp16_amax(ranges[name] * float(torch.exp(torch.tensor(RATE * 0.01)))) if learn else ranges[name]
        assert torch.allclose(amax, wanted, rtol=2e-3 if learn else 0)
        assert torch.equal(fp16_amax(amax), amax)
    assert not [name for name, _ in made.module.named_parameters() if "theta" in name]


def test_ranges_return_when_training_fails() -> None:
    net, io = residual()
    made = ptq(net, io, samples_of(io))
    ranges = modelopt.ranges(made.module)

    class StopError(RuntimeError):
        pass

    with pytest.raises(StopError), training_quantizers(made.module, learn=True):
        raise StopError
    assert all(torch.equal(value, ranges[name]) for name, value in modelopt.ranges(made.module).items())


def test_modelopt_has_no_learned_scales_for_int8() -> None:
    """Should it get them, this module can go: its LSQ is for block-scaled NVFP4 weights only."""
    import modelopt.torch.quantization as mtq

    assert "NVFP4" in str(mtq.config.LSQConfig.__doc__)
    assert "Currently, only NVFP4" in str(mtq.config.LSQConfig.__doc__)
