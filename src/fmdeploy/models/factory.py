"""From the name of a student to a network.

    cnn, vit            what the task builds in
    hf:FOLDER           a backbone in a local Hugging Face folder (config.json + model.safetensors)
    timm:NAME           a backbone of the timm package
    package.module:f    any callable of the user's that returns a torch.nn.Module
"""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fmdeploy.errors import ConfigError
from fmdeploy.iospec import IOSpec
from fmdeploy.task import Task

Options = Mapping[str, Any]
Builders = Mapping[str, Callable[[Options], nn.Module]]


def make_student(name: str, options: Options, io: IOSpec, built_in: Builders) -> nn.Module:
    """A fresh student.

    Args:
        name: See the top of this file.
        options: Keyword arguments of the network, such as `width`.
        io: What the task wants in and out; imported backbones get a head for it.
        built_in: The task's own students by name.

    Raises:
        ConfigError: no such student, or it does not take these options.
    """
    scheme, colon, rest = name.partition(":")
    try:
        if name in built_in:
            return built_in[name](options)
        if colon and scheme in ("hf", "timm"):
            from fmdeploy.models.backbone import hf_student, timm_student

            return (hf_student if scheme == "hf" else timm_student)(rest, options, io)
        if colon:
            return _call(name, options)
    except TypeError as error:
        raise ConfigError(f"cannot be built: {error}", where=f"student {name!r}", found=dict(options)) from error
    known = ", ".join([*built_in, "hf:FOLDER", "timm:NAME", "module:callable"])
    raise ConfigError("no such student", where=f"student {name!r}", expected=known)


def make_teacher(task: Task, name: str, options: Options) -> nn.Module:
    """A fresh teacher: the task's own, or one around an imported backbone.

    Args:
        task: What goes in and out.
        name: Empty for the task's own; `hf:` for a backbone whose configuration is in `options`.
        options: Sizes.

    Raises:
        ConfigError: unknown name or options.
    """
    if not name:
        return task.teacher(options)
    if name == "hf:":
        from fmdeploy.models.imported import imported_teacher

        return imported_teacher(options, task.io)
    raise ConfigError("no such teacher", where=f"teacher {name!r}", expected="the task's own, or hf:")


def _call(name: str, options: Options) -> nn.Module:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"cannot be loaded: {error}", where=f"student {name!r}", fix="Is the module on PYTHONPATH?"
        ) from error
    _refuse_strangers(name, function)
    found = function(**options)
    if not isinstance(found, nn.Module):
        raise ConfigError("is not a torch.nn.Module", where=f"student {name!r}", found=type(found).__name__)
    return found


def _refuse_strangers(name: str, function: object) -> None:
    """Only what says that it makes a network is called: names also come from artifacts, which may be forged."""
    made = function if isinstance(function, type) else getattr(function, "__annotations__", {}).get("return")
    if isinstance(made, str):  # from __future__ import annotations
        made = typing.get_type_hints(function).get("return")
    if not (isinstance(made, type) and issubclass(made, nn.Module)):
        raise ConfigError("is neither a torch.nn.Module class nor a function that is annotated to return one",
                          where=f"student {name!r}", expected="def name(...) -> torch.nn.Module")
