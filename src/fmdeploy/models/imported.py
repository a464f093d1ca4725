"""Teachers around an imported backbone: a DINOv2, ViT-MAE or I-JEPA encoder in the Hugging Face format.

Legend: B batch, C channels of all inputs together, H W rows and columns of an input, I those of the model's image,
N tokens of the whole picture, K visible ones, D embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmdeploy.errors import ConfigError
from fmdeploy.iospec import IOSpec
from fmdeploy.models.recompute import run
from fmdeploy.models.tokens import TokenBackbone
from fmdeploy.models.vit import class_and_grid
from fmdeploy.optional import require


class Family(NamedTuple):
    """What distinguishes one kind of encoder."""

    model: str
    """The class in transformers."""
    blocks: str
    """Name of its stack of blocks."""
    has_class: bool
    """Whether it has a class token."""


FAMILIES = {
    "dinov2": Family("Dinov2Model", "encoder.layer", True),  # arXiv:2304.07193
    "vit_mae": Family("ViTMAEModel", "layers", True),  # arXiv:2111.06377
    "ijepa": Family("IJepaModel", "layers", False),  # arXiv:2301.08243
}
IGNORED = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
           "attn_implementation", "_attn_implementation")
MOST_BLOCKS = 1000
MOST_PARAMETERS = 4e9  # the largest published encoders of these families have a quarter of that


def family_of(values: Mapping[str, Any], *, where: object) -> Family:
    """The family that a configuration belongs to.

    Raises:
        ConfigError: it is none of those that can be imported.
    """
    found = values.get("model_type")
    if found not in FAMILIES:
        raise ConfigError("is no backbone that can be imported", where=where, expected=", ".join(FAMILIES),
                          found=repr(found)[:60])
    return FAMILIES[str(found)]


def make_encoder(values: Mapping[str, Any], *, where: object) -> nn.Module:
    """An encoder with random weights from the content of a `config.json`; nothing is read or downloaded.

    Raises:
        ConfigError: it is no known encoder, or its values do not fit together.
    """
    transformers = require("transformers")
    family = family_of(values, where=where)
    plain = {key: value for key, value in values.items() if key not in IGNORED}
    _refuse_giant(plain, where)
    attention = "sdpa" if torch.cuda.is_available() else "eager"  # see models/vit.py
    try:
        config = transformers.AutoConfig.for_model(**plain, attn_implementation=attention)
        made: nn.Module = getattr(transformers, family.model)(config)
    except (TypeError, ValueError, KeyError, ZeroDivisionError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"its values do not make a network: {error}", where=where) from error
    except Exception as error:  # huggingface_hub has its own validation errors
        if not type(error).__module__.startswith("huggingface_hub"):
            raise
        raise ConfigError(f"its values do not make a network: {error}", where=where) from error
    return made


def _refuse_giant(values: Mapping[str, Any], where: object) -> None:
    """A few digits in a configuration would take all memory before a single weight is read.

    Raises:
        ConfigError: the network would be larger than any that is known.
    """
    def size(name: str, default: float) -> float:
        found = values.get(name, default)
        return float(min(found, 1e18)) if isinstance(found, int | float) else default  # transformers refuses the rest

    blocks, dim, patch = size("num_hidden_layers", 12), size("hidden_size", 768), max(1.0, size("patch_size", 16))
    inner = max(size("intermediate_size", 0), dim * size("mlp_ratio", 4))
    tokens = (size("image_size", 224) / patch) ** 2
    count = blocks * (4 * dim**2 + 2 * dim * inner) + dim * (tokens + patch**2 * size("num_channels", 3))
    if blocks > MOST_BLOCKS or count > MOST_PARAMETERS:
        raise ConfigError("describes a network too large to be built", where=where, found=f"{count:.2g} parameters",
                          expected=f"at most {MOST_PARAMETERS:.0g} in {MOST_BLOCKS} blocks")


class ImportedBackbone(TokenBackbone):
    """All inputs stacked → 1 x 1 convolution → resized → encoder.

    An encoder without a class token gets the mean of its tokens in that place.

    Args:
        encoder: As `make_encoder` makes it.
        family: Its family.
        num_channels: C.
        width: H = W of the inputs.
    """

    def __init__(self, encoder: nn.Module, family: Family, num_channels: int, width: int) -> None:
        super().__init__()
        config: Any = encoder.config
        self.family, self.image = family, int(config.image_size)
        self.dim, self.side = int(config.hidden_size), self.image // int(config.patch_size)
        if width % self.side:
            raise ConfigError("the tokens do not divide the input", where=f"{self.side} tokens a side", found=width,
                              expected=f"a multiple of {self.side}", fix="Choose another --side")
        self.patch = width // self.side
        self.entry = nn.Conv2d(num_channels, int(config.num_channels), 1)
        self.encoder = encoder
        self.activation_checkpointing = False  # see models/recompute.py
        for name, parameter in encoder.named_parameters():  # what gets no gradient stops DistributedDataParallel
            if "mask_token" in name or name.startswith("pooler."):
                parameter.requires_grad_(False)

    def tokens(self, *inputs: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """See `TokenBackbone.tokens`."""
        x_BCII = self.entry(torch.cat(inputs, dim=1))
        if x_BCII.shape[-1] != self.image:
            x_BCII = F.interpolate(x_BCII, (self.image, self.image), mode="bilinear", align_corners=False)
        state_BND = self._embedded(x_BCII, keep_BK)
        blocks = self.encoder.get_submodule(self.family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            state_BND = run(block, state_BND, recompute=self.activation_checkpointing)
        state_BND = self.encoder.get_submodule("layernorm")(state_BND)
        if self.family.has_class:
            return torch.as_tensor(state_BND)
        return torch.cat((state_BND.mean(dim=1, keepdim=True), state_BND), dim=1)

    def _embedded(self, x_BCII: Tensor, keep_BK: Tensor | None) -> Tensor:
        """Tokens with their positions; the class token first where there is one."""
        part: Any = self.encoder.get_submodule("embeddings")
        first = 1 if self.family.has_class else 0
        patch_BND = part.patch_embeddings(x_BCII) + part.position_embeddings[:, first:]
        if keep_BK is not None:
            patch_BND = patch_BND.gather(1, keep_BK[..., None].expand(-1, -1, patch_BND.shape[-1]))
        if not first:
            return torch.as_tensor(patch_BND)
        class_B1D = (part.cls_token + part.position_embeddings[:, :1]).expand(len(patch_BND), -1, -1)
        return torch.cat((class_B1D, patch_BND), dim=1)

    forward = tokens


class ImportedTeacher(nn.Module):
    """An imported backbone and one small head for each output of the task.

    Args:
        backbone: Turns the inputs into tokens.
        io: The task's specification: an output (C, H, W) is read off the tokens, one (C,) off the class token.
        rebuild: Name and options under which it is built again.
    """

    def __init__(self, backbone: ImportedBackbone, io: IOSpec, rebuild: tuple[str, dict[str, Any]]) -> None:
        super().__init__()
        self.backbone, self.rebuild = backbone, rebuild
        self.tokens = nn.Identity()  # a name for the feature loss to hook: (B, D, side, side)
        self.heads = nn.ModuleList(_head(backbone, spec.shape) for spec in io.outputs)
        self.reads_class = tuple(len(spec.shape) == 1 for spec in io.outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One tensor for each output of the task, from inputs (B, C, H, W)."""
        class_BD, grid_BDHW = class_and_grid(self.backbone.tokens(*inputs), self.backbone.side)
        grid_BDHW = self.tokens(grid_BDHW)
        return tuple(head(class_BD if reads_class else grid_BDHW)
                     for head, reads_class in zip(self.heads, self.reads_class, strict=True))


def _head(backbone: ImportedBackbone, shape: tuple[int, ...]) -> nn.Module:
    if len(shape) == 1:
        return nn.Linear(backbone.dim, shape[0])
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ConfigError("no head for an output of this shape", expected="(C,) or (C, H, H)", found=shape)
    if shape[1] % backbone.side == 0:
        fine = shape[1] // backbone.side
        return nn.Sequential(nn.Conv2d(backbone.dim, shape[0] * fine * fine, 1), nn.PixelShuffle(fine))
    return nn.Sequential(
        nn.Conv2d(backbone.dim, shape[0], 1), nn.Upsample(size=shape[1:], mode="bilinear", align_corners=False)
    )


def imported_teacher(options: Mapping[str, Any], io: IOSpec) -> nn.Module:
    """A teacher with random weights around the encoder that `options["config"]` describes.

    Raises:
        ConfigError: it is no known encoder, or does not suit the task's inputs.
    """
    if sorted(options) != ["config"] or not isinstance(options["config"], Mapping):
        raise ConfigError("takes the encoder's configuration and nothing else", where="teacher 'hf:'",
                          expected="config", found=", ".join(options))
    sizes = {spec.shape[1:] for spec in io.inputs}
    if len(sizes) != 1 or any(len(size) != 2 or size[0] != size[1] for size in sizes):
        raise ConfigError("an imported backbone needs square inputs of one size", where="teacher 'hf:'",
                          found=", ".join(str(spec.shape) for spec in io.inputs))
    values = dict(options["config"])
    encoder = make_encoder(values, where="teacher 'hf:'")
    channels, width = sum(spec.shape[0] for spec in io.inputs), io.inputs[0].shape[1]
    backbone = ImportedBackbone(encoder, family_of(values, where="teacher 'hf:'"), channels, width)
    return ImportedTeacher(backbone, io, ("hf:", {"config": copy.deepcopy(values)}))
