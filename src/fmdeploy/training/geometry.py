"""Moving maps: a part of a map resampled to the whole, mirrored; numpy arrays and tensors of any resolution alike.

A box is given in shares of the map's sides, so that one box moves inputs of 64 cells and features of 8. Positions that
fall on cells are copied; others are bilinear, or nearest where the values are whole numbers (labels).

Legend: B batch, C channels, H W rows and columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.task import Geometry

if TYPE_CHECKING:
    from torch import Tensor

EXACT = 1e-6  # of a cell: closer to a cell than this is on it


def moved(value: Any, geometry: Geometry) -> Any:
    """`value` (B, C, H, W), array or tensor, moved; a copy of the same type and dtype."""
    if geometry.box_B4 is not None:
        value = _resampled(value, geometry.box_B4)
    return _mirrored(value, geometry.flip)


def _mirrored(value: Any, mask: Any) -> Any:
    """The last axis of the masked samples reversed."""
    if isinstance(value, np.ndarray):
        result = value.copy()
        result[mask] = value[mask][..., ::-1]
        return result
    import torch

    return torch.where(torch.as_tensor(mask, device=value.device)[:, None, None, None], value.flip(-1), value)


def _resampled(value: Any, box_B4: Any) -> Any:
    import torch

    if not isinstance(value, np.ndarray):
        return _resample(value, torch.as_tensor(box_B4))
    # An array may be read-only or lie in float16, which torch cannot interpolate on every device.
    wide = value.astype(np.float32) if value.dtype == np.float16 else np.array(value)
    return _resample(torch.from_numpy(wide), torch.as_tensor(box_B4)).numpy().astype(value.dtype, copy=False)


def _resample(map_BCHW: Tensor, box_B4: Tensor) -> Tensor:
    """The boxes (top, left, height, width) of (B, C, H, W), each stretched to the whole (H, W)."""
    for axis in (2, 3):
        map_BCHW = _along(map_BCHW, axis, box_B4[:, axis - 2], box_B4[:, axis])
    return map_BCHW


def _along(map_BCHW: Tensor, axis: int, start_B: Tensor, length_B: Tensor) -> Tensor:
    import torch

    size = map_BCHW.shape[axis]
    centre_S = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    position_BS = (start_B[:, None].cpu() + centre_S * length_B[:, None].cpu()) * size - 0.5
    position_BS = position_BS.clamp(0, size - 1)
    if not map_BCHW.is_floating_point():
        return _gathered(map_BCHW, axis, (position_BS + 0.5).floor().long().clamp(max=size - 1))
    whole_BS = (position_BS + EXACT).floor()
    share_BS = (position_BS - whole_BS).clamp(min=0)
    first = _gathered(map_BCHW, axis, whole_BS.long())
    if bool((share_BS <= EXACT).all()):
        return first
    second = _gathered(map_BCHW, axis, (whole_BS.long() + 1).clamp(max=size - 1))
    shape = (len(share_BS), 1, size, 1) if axis == 2 else (len(share_BS), 1, 1, size)
    share = torch.where(share_BS <= EXACT, 0.0, share_BS).to(map_BCHW.dtype).to(map_BCHW.device).view(shape)
    return torch.lerp(first, second, share.expand_as(first))


def _gathered(map_BCHW: Tensor, axis: int, index_BS: Tensor) -> Tensor:
    index_BS = index_BS.to(map_BCHW.device)
    index = index_BS[:, None, :, None] if axis == 2 else index_BS[:, None, None, :]
    return map_BCHW.gather(axis, index.expand(map_BCHW.shape))


def shifted(rows_B: Array, columns_B: Array) -> Array:
    """Boxes (B, 4) that look at the map moved down and right by shares of its sides."""
    box_B4 = np.ones((len(rows_B), 4))
    box_B4[:, 0], box_B4[:, 1] = -rows_B, -columns_B
    return box_B4
