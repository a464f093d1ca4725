"""What each method adds to a teacher, and which parameters it trains.

    lora        low-rank updates of linear layers and convolutions (arXiv:2106.09685), by `peft`
    adapter     bottlenecks behind attention and perceptron (arXiv:1902.00751)
    prompt      learned tokens (arXiv:2203.12119)
    bias-norm   biases and normalisation (arXiv:2106.10199)
    head        what stands behind the backbone
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

from fmdeploy.config import validate
from fmdeploy.errors import ConfigError
from fmdeploy.models.additions import Addition, add
from fmdeploy.models.saved import LoadedModel
from fmdeploy.models.tokens import TokenBackbone
from fmdeploy.teacher.adapt.config import Also, Method
from fmdeploy.teacher.adapt.lora import add_lora

NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm)


class Plan(BaseModel):
    """What is done to a teacher; the same plan on the same teacher gives the same parameter names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method
    options: dict[str, Any]
    also: tuple[Also, ...] = ()


def apply_plan(loaded: LoadedModel, plan: Plan) -> list[str]:
    """Freeze the teacher, add what the plan adds, in place, and let only what it trains want a gradient.

    Returns:
        Names of the parameters that are trained.

    Raises:
        ConfigError: the teacher has nothing that this method could train.
    """
    teacher = loaded.module.requires_grad_(False)
    before = {name for name, _ in teacher.named_parameters()}
    chosen: list[str] = []
    for part in plan.also:  # named first: peft renames what it wraps
        chosen += _names(loaded, part, ())
    kept = [teacher.get_parameter(name) for name in chosen]
    if plan.method == "lora":
        add_lora(teacher, **plan.options)
    elif plan.method in ("adapter", "prompt"):
        what = {"kind": plan.method, "options": plan.options}
        add(teacher, [validate(Addition, what, where=f"method {plan.method}")])
        for name, parameter in teacher.named_parameters():
            parameter.requires_grad_(name not in before)
    else:
        kept += [teacher.get_parameter(name) for name in _names(loaded, plan.method, plan.options.get("targets", ()))]
    for parameter in kept:
        parameter.requires_grad_(True)
    return [name for name, parameter in teacher.named_parameters() if parameter.requires_grad]


def _names(loaded: LoadedModel, part: str, targets: Sequence[str]) -> list[str]:
    """Parameters of the teacher as it is that `part` trains."""
    found = _bias_and_norm(loaded.module) if part == "bias-norm" else _head(loaded, targets)
    names = list(found)
    if not names:
        raise ConfigError("the teacher has no parameters of that kind", where=f"method {part}",
                          found=", ".join(targets) or None)
    return names


def _bias_and_norm(teacher: nn.Module) -> Iterator[str]:
    for at, module in teacher.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if isinstance(module, NORMS) or name.endswith("bias"):
                yield f"{at}.{name}" if at else name


def _head(loaded: LoadedModel, targets: Sequence[str]) -> Iterator[str]:
    """Everything outside the backbone; without one, what stands behind the layer that features are read from."""
    behind = tuple(targets) or _behind(loaded)
    for name, _ in loaded.module.named_parameters():
        if any(name == target or name.startswith(f"{target}.") for target in behind):
            yield name


def _behind(loaded: LoadedModel) -> tuple[str, ...]:
    children = [name for name, _ in loaded.module.named_children()]
    if isinstance(getattr(loaded.module, "backbone", None), TokenBackbone):
        return tuple(name for name in children if name != "backbone")
    layer = loaded.task.teacher_layer.partition(".")[0]
    if layer not in children:
        raise ConfigError("what is this teacher's head?", where="method head", found=", ".join(children),
                          fix="Name it with --targets")
    return tuple(children[children.index(layer) + 1 :])
