"""A Hugging Face folder of DINOv2, ViT-MAE or I-JEPA: `config.json` and safetensors, local files only, no code.

Legend: N tokens, D embedding.
"""

from __future__ import annotations

import contextlib
import stat
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmdeploy import strictjson
from fmdeploy.errors import ConfigError, ModelFileError, first_line
from fmdeploy.models.imported import IGNORED, Family, family_of, make_encoder
from fmdeploy.optional import require
from fmdeploy.teacher.importing.fit import Fit

MAX_CONFIG_BYTES = 2**20
POSITIONS = "embeddings.position_embeddings"


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object.

    Raises:
        ModelFileError: it is missing, no regular file, too large, or no JSON object.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode) or path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelFileError("is no small regular file", where=path)
        found = strictjson.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelFileError("is missing: this is no Hugging Face folder", where=path) from error
    except (OSError, ValueError) as error:
        raise ModelFileError(f"is not readable JSON: {first_line(error)}", where=path) from error
    if not isinstance(found, dict):
        raise ModelFileError("is not a JSON object", where=path)
    return found


def load_folder(folder: Path) -> tuple[nn.Module, dict[str, Any], Fit]:
    """The encoder with its weights, its configuration, and how the weights fit.

    `transformers` reads them: it knows the names that older versions of it gave.

    Raises:
        ModelFileError: files are missing, damaged, or of another network.
        ConfigError: it is no family that can be imported.
    """
    transformers = require("transformers")
    values = read_json(folder / "config.json")
    family = family_of(values, where=folder)
    if not any(folder.glob("*.safetensors")):
        pickled = next(iter(sorted([*folder.glob("*.bin"), *folder.glob("*.pt*")])), None)
        raise ModelFileError("holds no safetensors file", where=folder, found=pickled.name if pickled else None,
                             fix=f"Import that file: fmdeploy teacher import {pickled} --hf-config {folder}"
                             if pickled else None)
    encoder = make_encoder(values, where=folder / "config.json")
    with _quiet(transformers):
        try:
            encoder, info = getattr(transformers, family.model).from_pretrained(
                str(folder), config=encoder.config, local_files_only=True, use_safetensors=True, dtype=torch.float32,
                trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True)
        except Exception as error:  # whatever the library makes of a foreign file
            raise ModelFileError(f"cannot be loaded: {first_line(error)}", where=folder) from error
    return encoder, values, _fit_of(encoder, info)


def _fit_of(encoder: nn.Module, info: Mapping[str, Any]) -> Fit:
    """What `from_pretrained` says, as we say it."""
    own = encoder.state_dict()
    misshapen = {str(name): (tuple(mine), tuple(theirs)) for name, theirs, mine in sorted(info["mismatched_keys"])}
    missing = tuple(sorted(str(name) for name in info["missing_keys"] if "mask_token" not in name
                           and not name.startswith("pooler.") and name not in misshapen))
    strange = sorted(map(str, info["unexpected_keys"]))
    parts = {name.partition(".")[0] for name in own} | {"encoder", "layers"}
    inside = tuple(name for name in strange if name.partition(".")[0] in parts)
    state = {name: value for name, value in own.items() if name not in (*missing, *misshapen)}
    return Fit("", state, missing, inside, misshapen, tuple(name for name in strange if name not in inside))


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No bars, no advice: what does not fit we say ourselves."""
    log = transformers.utils.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()


def for_input(encoder: nn.Module, values: Mapping[str, Any], family: Family, width: int, side: int | None
              ) -> dict[str, Any]:
    """Resample the encoder's positions for `side` tokens, in place, and return the configuration that fits them.

    Args:
        encoder: Its positions are for the images it was trained on.
        values: Its configuration.
        family: Whether a class token stands first.
        width: Of the task's inputs.
        side: Tokens a side; None: the number that divides `width` and is nearest to the encoder's own.

    Raises:
        ConfigError: `side` does not divide `width`.
    """
    config: Any = encoder.config
    if not (isinstance(config.image_size, int) and isinstance(config.patch_size, int)):
        raise ConfigError("is not for square images", where="config.json", found=config.image_size)
    own = config.image_size // config.patch_size
    if side is None:
        side = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: (abs(n - own), n))
    if width % side:
        raise ConfigError("does not divide the input", where="side", found=side, expected=f"a divisor of {width}")
    if side != own:
        embeddings: Any = encoder.get_submodule("embeddings")
        old = embeddings.position_embeddings
        fresh = resampled(old.data, own, side, first=1 if family.has_class else 0)
        embeddings.position_embeddings = nn.Parameter(fresh, requires_grad=old.requires_grad)
    kept = {key: value for key, value in values.items() if key not in IGNORED}
    return {**kept, "image_size": side * config.patch_size}


def resampled(position_1ND: Tensor, old: int, new: int, *, first: int) -> Tensor:
    """Position embeddings of `old` x `old` tokens for `new` x `new`, bicubic (arXiv:2010.11929, section 3.2)."""
    grid_1DNN = position_1ND[:, first:].transpose(1, 2).reshape(1, -1, old, old)
    finer = F.interpolate(grid_1DNN, (new, new), mode="bicubic", align_corners=False)
    return torch.cat((position_1ND[:, :first], finer.flatten(2).transpose(1, 2)), dim=1).contiguous()


def start_entry(entry: nn.Conv2d, folder: Path) -> bool:
    """Let the input convolution pass images through, normalised as the encoder was trained, where channels agree.

    Returns:
        Whether it was done; else it keeps its random weights.
    """
    if entry.in_channels != entry.out_channels:
        return False
    path = folder / "preprocessor_config.json"
    said = read_json(path) if path.is_file() else {}
    mean_C, std_C = (_channel_values(said.get(key), entry.in_channels, default)
                     for key, default in (("image_mean", 0.0), ("image_std", 1.0)))
    with torch.no_grad():
        entry.weight.copy_(torch.diag(1 / std_C)[:, :, None, None])
        if entry.bias is not None:
            entry.bias.copy_(-mean_C / std_C)
    return True


def _channel_values(found: Any, count: int, default: float) -> Tensor:
    if isinstance(found, list) and len(found) == count and all(isinstance(v, int | float) for v in found):
        values = torch.tensor([float(v) for v in found])
        if bool(torch.isfinite(values).all()) and (default == 0 or bool((values > 0).all())):
            return values
    return torch.full((count,), default)
