"""Imported backbones as students: an adapter in front, a head for the task's outputs behind.

Legend: B batch, C channels, H W rows and columns, h w those of the backbone's map, N tokens, D embedding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmdeploy.errors import ConfigError, ModelFileError
from fmdeploy.iospec import IOSpec
from fmdeploy.optional import require


class BackboneStudent(nn.Module):
    """All inputs stacked → 1 x 1 convolution → backbone → one small head for each output.

    Args:
        backbone: Maps images (B, C, S, S) to a map (B, D, h, w).
        num_channels: C.
        size: S; inputs are resized to it (bilinear), None leaves them.
        dim: D.
        io: The task's specification. Its inputs must share their spatial size; an output of shape (C, H, W) gets a
            map head, one of shape (C,) a pooled linear head.
        rebuild: Name and options under which a saved student is built again without its source.
    """

    def __init__(
        self, backbone: nn.Module, num_channels: int, size: int | None, dim: int, io: IOSpec,
        rebuild: tuple[str, dict[str, Any]],
    ) -> None:
        super().__init__()
        self.adapter = nn.Conv2d(sum(spec.shape[0] for spec in io.inputs), num_channels, 1)
        self.backbone, self.size, self.rebuild = backbone, size, rebuild
        self.trunk = nn.Identity()  # a name for the feature loss to hook: (B, D, h, w)
        self.heads = nn.ModuleList(_head(dim, spec.shape) for spec in io.outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One tensor for each output of the task, from inputs (B, C, H, W)."""
        x_BCHW = self.adapter(torch.cat(inputs, dim=1))
        if self.size is not None and x_BCHW.shape[-1] != self.size:
            x_BCHW = F.interpolate(x_BCHW, (self.size, self.size), mode="bilinear", align_corners=False)
        map_BDhw = self.trunk(self.backbone(x_BCHW))
        return tuple(head(map_BDhw) for head in self.heads)


def _head(dim: int, shape: tuple[int, ...]) -> nn.Module:
    if len(shape) == 1:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim, shape[0]))
    if len(shape) != 3:
        raise ConfigError("no head for an output of this shape", expected="(C,) or (C, H, W)", found=shape)
    return nn.Sequential(
        nn.Conv2d(dim, shape[0], 1), nn.Upsample(size=shape[1:], mode="bilinear", align_corners=False)
    )


class _TokenMap(nn.Module):
    """Turn what a transformers or timm backbone returns into a map (B, D, h, w)."""

    def __init__(self, model: nn.Module, call: str | None) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.call is not None:
            found = getattr(self.model, self.call)(x_BCHW)
        else:
            found = self.model(pixel_values=x_BCHW).last_hidden_state
        if found.ndim == 4:
            return torch.as_tensor(found)
        side = math.isqrt(found.shape[1])  # class and register tokens stand in front of the side² patches
        return torch.as_tensor(found[:, found.shape[1] - side * side :].transpose(1, 2).unflatten(2, (side, side)))


def hf_student(folder: str, options: Mapping[str, Any], io: IOSpec) -> nn.Module:
    """A student around the vision backbone in `folder`; never downloads and runs no code from there.

    A saved student is rebuilt from `options["config"]`, without the folder.

    Raises:
        ModelFileError: the folder holds no backbone that transformers can load.
    """
    transformers = require("transformers")
    if unknown := sorted(set(options) - {"config"}):
        raise ConfigError(f"takes no option {unknown[0]!r}: its sizes are the folder's", where=f"student 'hf:{folder}'")
    if "config" in options:
        values = dict(options["config"])
        config = transformers.AutoConfig.for_model(**values)
        model = transformers.AutoModel.from_config(config, trust_remote_code=False)
    else:
        values, model = _from_folder(transformers, Path(folder))
        config = model.config
    if not hasattr(config, "num_channels") or not hasattr(config, "hidden_size"):
        raise ModelFileError("is not a vision backbone", where=folder, found=getattr(config, "model_type", "?"))
    _freeze_unused(model)
    backbone = _TokenMap(model, None)
    size = int(config.image_size) if isinstance(getattr(config, "image_size", None), int) else None
    return BackboneStudent(backbone, config.num_channels, size, config.hidden_size, io, ("hf:", {"config": values}))


def _from_folder(transformers: Any, folder: Path) -> tuple[dict[str, Any], Any]:
    if not (folder / "config.json").is_file():
        raise ModelFileError("is not a Hugging Face folder: it has no config.json", where=folder)
    try:
        model = transformers.AutoModel.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelFileError(f"cannot be loaded: {error}", where=folder) from error
    return json.loads((folder / "config.json").read_text(encoding="utf-8")), model


def _freeze_unused(model: nn.Module) -> None:
    """Parameters that the map does not depend on get no gradient, which DistributedDataParallel insists on."""
    for name, parameter in model.named_parameters():
        if "mask_token" in name or name.startswith("pooler."):
            parameter.requires_grad_(False)


def timm_student(name: str, options: Mapping[str, Any], io: IOSpec) -> nn.Module:
    """A student around a randomly initialised timm backbone.

    Raises:
        MissingDependencyError: timm (and the torchvision it needs) is not installed.
        ConfigError: timm knows no such model.
    """
    timm = require("timm")
    if not timm.is_model(name):
        raise ConfigError("timm knows no such model", where=f"student 'timm:{name}'")
    model = timm.create_model(name, pretrained=False, num_classes=0, **options)
    return BackboneStudent(
        _TokenMap(model, "forward_features"), 3, None, model.num_features, io, (f"timm:{name}", dict(options))
    )
