"""The adapter to modelopt. Tests called `test_quirk_*` fail when modelopt no longer needs the workaround: drop it then."""

from __future__ import annotations

import importlib.metadata
import re
import warnings

import pytest
import torch
from torch import Tensor, nn

from fmdeploy.errors import DataError, InputError
from fmdeploy.quantize import modelopt
from support.quantize_nets import Residual, SmallViT

IMAGE = torch.rand(1, 3, 16, 16)


class _OneTensor(nn.Module):
    """A linear layer behind an activation tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.tensor, self.layer = modelopt.ActivationTensor(), nn.Linear(4, 3)

    def forward(self, x_BC: Tensor) -> Tensor:
        y_BC: Tensor = self.layer(self.tensor(x_BC))
        return y_BC


def _converted() -> nn.Module:
    return modelopt.convert(_OneTensor().eval(), weights=["layer"], inputs=["tensor"])


def _default(model: nn.Module, image: Tensor = IMAGE) -> nn.Module:
    mtq = modelopt.load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised: nn.Module = mtq.quantize(model.eval(), mtq.INT8_DEFAULT_CFG, lambda m: m(image))
    return quantised


def test_installed_version_is_the_one_whose_quirks_are_known() -> None:
    assert importlib.metadata.version("nvidia-modelopt").startswith("0.47.")


def test_quirk_modelopt_does_not_declare_what_it_imports() -> None:
    declared = [r for r in importlib.metadata.requires("nvidia-modelopt") or [] if "extra ==" not in r]
    names = {re.split(r"[^A-Za-z0-9_-]", r)[0].lower().replace("-", "_") for r in declared}
    assert not names & {"requests", "huggingface_hub"}


def test_quirk_modelopt_prints_to_stdout_and_the_adapter_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    _converted()
    assert capsys.readouterr().out == ""
    _default(Residual())
    assert "quantizers" in capsys.readouterr().out


def test_quirk_functional_adds_get_no_quantizer() -> None:
    names = [name for name, _ in modelopt.quantizers(_default(Residual()))]
    assert {name.split(".")[0] for name in names} == {"stem", "conv", "head"}


def test_quirk_default_configuration_quantises_layernorm_inputs() -> None:
    names = [name for name, _ in modelopt.quantizers(_default(SmallViT()))]
    assert "norm1.input_quantizer" in names


@pytest.mark.filterwarnings("ignore")
def test_quirk_dynamo_export_fails_on_quantised_modules() -> None:
    model = _converted()
    modelopt.calibrate(model, lambda m: m(torch.rand(2, 4)))
    with pytest.raises(Exception, match="(?s)GuardOnDataDependent|data-dependent|Could not guard"):
        torch.onnx.export(model, (torch.rand(1, 4),), dynamo=True, verbose=False)


def test_only_named_modules_are_quantised_symmetric_int8() -> None:
    found = dict(modelopt.quantizers(_converted()))
    assert set(found) == {"tensor.input_quantizer", "layer.weight_quantizer"}
    assert all(q.num_bits == 8 and not q.unsigned and not q.narrow_range for q in found.values())
    assert found["layer.weight_quantizer"].axis == 0


def test_unknown_module_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="no module 'other'"):
        modelopt.convert(_OneTensor(), weights=["other"], inputs=[])


def test_range_is_the_largest_absolute_value_of_the_float_model() -> None:
    model = _converted()
    x = torch.tensor([[0.5, -2.0, 1.0, 0.0], [0.1, 0.2, 1.5, -0.3]])
    modelopt.calibrate(model, lambda m: m(x))
    found = modelopt.ranges(model)
    assert found["tensor.input_quantizer"] == 2.0
    weight = model.get_parameter("layer.weight")
    assert torch.equal(found["layer.weight_quantizer"].flatten(), weight.abs().amax(1))


def test_ranges_round_trip_and_foreign_ones_are_refused() -> None:
    model, other = _converted(), _converted()
    modelopt.calibrate(model, lambda m: m(torch.rand(3, 4)))
    modelopt.set_ranges(other, modelopt.ranges(model))
    assert all(torch.equal(a, b) for a, b in zip(modelopt.ranges(model).values(), modelopt.ranges(other).values(), strict=True))
    with pytest.raises(InputError, match="do not belong to this model"):
        modelopt.set_ranges(other, {"tensor.input_quantizer": torch.tensor(1.0)})


def test_uncalibrated_quantizer_is_an_error() -> None:
    with pytest.raises(DataError, match="saw no data"):
        modelopt.ranges(_converted())


def test_float_mode_switches_fake_quantisation_off_and_on_again() -> None:
    plain = _OneTensor().eval()
    model = modelopt.convert(_OneTensor().eval(), weights=["layer"], inputs=["tensor"])
    model.load_state_dict(plain.state_dict())
    x = torch.rand(5, 4)
    modelopt.calibrate(model, lambda m: m(x))
    with modelopt.float_mode(model):
        assert torch.equal(model(x), plain(x))
    assert not torch.equal(model(x), plain(x))


def test_quirk_bare_networks_compute_what_float_mode_computes_without_asking_quantizers() -> None:
    model = _converted()
    x = torch.rand(5, 4)
    modelopt.calibrate(model, lambda m: m(x))
    before = model(x)
    with modelopt.float_mode(model):
        plain = model(x)
    asked: list[str] = []
    for name, quantizer in modelopt.quantizers(model):
        quantizer.register_forward_pre_hook(lambda *_, name=name: asked.append(name))
    with modelopt.bare(model):
        assert torch.equal(model(x), plain)
        assert not asked
    assert torch.equal(model(x), before)
    assert len(set(asked)) == 2
    with pytest.raises(ZeroDivisionError), modelopt.bare(model):
        _ = 1 / 0
    assert torch.equal(model(x), before), "an error inside leaves the model quantised"


def test_the_range_of_one_quantizer_is_set() -> None:
    model = _converted()
    modelopt.calibrate(model, lambda m: m(torch.rand(5, 4)))
    before = modelopt.ranges(model)
    modelopt.set_range(model, "tensor.input_quantizer", torch.tensor(5.0))
    assert modelopt.ranges(model)["tensor.input_quantizer"] == 5.0
    assert torch.equal(modelopt.ranges(model)["layer.weight_quantizer"], before["layer.weight_quantizer"])
