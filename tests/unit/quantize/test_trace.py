"""From plain modules to foldable graphs, and the source line that prevents it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fmdeploy.errors import InputError
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.build import apply
from fmdeploy.quantize.policy import place
from fmdeploy.quantize.trace import UntraceableError, float_graph, trace
from support.quantize_nets import Branching, Residual, bev_student, image_net, settle


def _ops(graph: torch.fx.GraphModule) -> set[str]:
    return {type(m).__name__ for m in graph.modules()}


@settings(max_examples=15, deadline=None)
@given(
    groups=st.sampled_from([1, 2]), kernel=st.sampled_from([1, 3]), bias=st.booleans(), affine=st.booleans(),
    seed=st.integers(0, 99),
)
def test_folding_batchnorm_keeps_the_function(groups: int, kernel: int, bias: bool, affine: bool, seed: int) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(4, 6, kernel, padding=kernel // 2, groups=groups, bias=bias)
    norm = nn.BatchNorm2d(6, affine=affine)
    x_BCHW = torch.randn(3, 4, 5, 5)
    net = nn.Sequential(conv, norm, nn.ReLU())
    for _ in range(5):
        net(x_BCHW * 3 + 1)
    graph = float_graph(net, (x_BCHW,))
    assert "BatchNorm2d" not in _ops(graph)
    torch.testing.assert_close(graph(x_BCHW), net.eval()(x_BCHW), rtol=1e-4, atol=1e-4)


def test_linear_and_transposed_convolutions_are_folded_too() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 5),
                        nn.BatchNorm1d(5))
    x_BCHW = torch.randn(4, 2, 2, 2)
    net(x_BCHW)
    assert not _ops(float_graph(net, (x_BCHW,))) & {"BatchNorm1d", "BatchNorm2d"}


def test_batchnorm_stays_where_another_reader_needs_the_raw_tensor() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x_BCHW: Tensor) -> Tensor:
            y_BCHW = self.conv(x_BCHW)
            z_BCHW: Tensor = self.norm(y_BCHW) + y_BCHW
            return z_BCHW

    assert "BatchNorm2d" in _ops(float_graph(Two(), (torch.rand(2, 2, 4, 4),)))


def test_in_place_activations_and_dropout_do_not_change_the_result() -> None:
    net, _ = image_net(Residual())
    x_BCHW = torch.rand(2, 3, 16, 16)
    graph = float_graph(net, (x_BCHW,))
    assert "Dropout" not in _ops(graph)
    torch.testing.assert_close(graph(x_BCHW), net(x_BCHW), rtol=1e-4, atol=1e-4)


def test_the_model_itself_is_not_touched() -> None:
    net, _ = bev_student()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    float_graph(net, (torch.rand(1, 8, 64, 64), torch.rand(1, 12, 64, 64)))
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_untraceable_forward_names_its_source_line() -> None:
    with pytest.raises(UntraceableError, match=r"quantize_nets\.py:\d+ `if x_BC\.sum\(\) > 0:`"):
        float_graph(Branching(), (torch.rand(1, 6),))


def test_randomness_in_forward_is_noticed() -> None:
    class Noisy(nn.Module):
        def forward(self, x_BC: Tensor) -> Tensor:
            return x_BC + torch.rand(1)

    with pytest.raises(UntraceableError, match="computes something else"):
        float_graph(Noisy(), (torch.rand(1, 3),))


def test_wrong_number_of_inputs_is_refused() -> None:
    net, _ = image_net(Residual())
    with pytest.raises(InputError, match="another number of inputs"):
        float_graph(net, (torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)))


def test_settled_nets_have_batchnorm_that_matters() -> None:
    """Guards the tests above: with fresh statistics a fold that does nothing would pass them."""
    net, io = image_net(Residual())
    norm = net.get_submodule("bn")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert float(norm.running_mean.abs().max()) > 1e-3
    assert settle(net, io) is net


class Dictionary(nn.Module):
    """Returns its outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        return {"logits": self.conv(x_BCHW)}


def test_outputs_by_name_are_refused_clearly() -> None:
    with pytest.raises(InputError, match=r"expected a tensor, or a tuple of tensors in the order .*, found dict"):
        float_graph(Dictionary(), (torch.rand(1, 3, 4, 4),))


def test_a_tensor_that_is_overwritten_is_read_anew() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)

        def forward(self, x_BCHW: Tensor) -> Tensor:
            x_BCHW = self.conv(input=x_BCHW)
            self.relu(x_BCHW)
            x_BCHW.add_(1.0)
            y_BCHW: Tensor = self.conv(x_BCHW)
            return y_BCHW

    net, x_BCHW = Overwrites().eval(), torch.randn(2, 3, 4, 4)
    traced = trace(net, (x_BCHW,))
    assert traced.method == "fx"
    torch.testing.assert_close(traced.graph(x_BCHW), net(x_BCHW))


def test_a_batch_size_that_forward_fixes_cannot_be_exported() -> None:
    class Fixed(nn.Module):
        def forward(self, x_BC: Tensor) -> Tensor:
            return x_BC.reshape(int(x_BC.shape[0]), -1) * 2

    with pytest.raises(UntraceableError, match="forward turns the batch size into a fixed number"):
        trace(Fixed(), (torch.rand(1, 3),))


def test_a_model_for_one_batch_size_is_traced() -> None:
    class One(nn.Module):
        def forward(self, x_BC: Tensor) -> Tensor:
            return torch.cat((x_BC, torch.ones(1, 1)), 1)

    with pytest.raises(RuntimeError):
        One()(torch.rand(2, 3))
    assert trace(One(), (torch.rand(1, 3),)).method == "fx"


def test_sizes_asked_for_are_no_tensors() -> None:
    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4 * 16, 2)

        def forward(self, x_BCHW: Tensor) -> Tensor:
            x_BCHW = torch.relu(self.conv(x_BCHW))
            y_BC: Tensor = self.head(x_BCHW.view(x_BCHW.size(0), x_BCHW.shape[1] * 16))
            return y_BC

    graph = float_graph(Sizes(), (torch.rand(1, 3, 4, 4),))
    placement = place(graph)
    assert {t for row in placement.activations for t in row.tensors} == {"x_bchw", "relu"}
    module = apply(graph, placement)
    with torch.no_grad():
        modelopt.calibrate(module, lambda m: m(torch.rand(4, 3, 4, 4)))
    assert module(torch.rand(5, 3, 4, 4)).shape == (5, 2)


def test_a_bias_that_folding_makes_can_be_trained() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    assert all(p.requires_grad for p in float_graph(net, (torch.rand(1, 3, 4, 4),)).parameters())


def test_a_model_that_does_not_run_is_named_with_its_line() -> None:
    class Broken(nn.Module):
        def forward(self, x_BC: Tensor) -> Tensor:
            return x_BC @ torch.rand(7, 2)

    with pytest.raises(InputError, match=r"test_trace\.py:\d+ `return x_BC @ torch\.rand\(7, 2\)`: the model does not run"):
        float_graph(Broken(), (torch.rand(1, 3),))
