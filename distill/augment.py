"""Where the maps of a step are moved to: mirrored, shifted, cropped; a pure function of seed and step.

Legend: B samples of one whole step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fmdeploy.arrays import Array
from fmdeploy.config import validate
from fmdeploy.errors import ConfigError
from fmdeploy.iospec import IOSpec
from fmdeploy.task import Geometry
from fmdeploy.training.geometry import shifted
from fmdeploy.training.sampler import mirror_mask, my_part

BOX_STREAM = 0x626F


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FlipConfig(_Options):
    """Mirroring has no options."""


class TranslateConfig(_Options):
    """How far inputs are shifted, in their own cells."""

    cells: int = Field(default=8, ge=1, description="largest shift along each axis")
    step: int = Field(default=1, ge=1, description="shifts are multiples of this: the features' stride is exact")


class CropConfig(_Options):
    """How small a part is stretched to the whole."""

    smallest: float = Field(default=0.75, gt=0, lt=1, description="smallest side, as a share of the whole")


CONFIGS: dict[str, type[_Options]] = {"flip": FlipConfig, "translate": TranslateConfig, "crop": CropConfig}


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a sample.

    Attributes:
        flip: Half of them are mirrored.
        size: (rows, columns) of the inputs' maps; None where no input is a map.
        translate: How far they are shifted; None: not.
        crop: How small a part is seen; None: the whole.
    """

    flip: bool
    size: tuple[int, int] | None = None
    translate: TranslateConfig | None = None
    crop: CropConfig | None = None

    @classmethod
    def of(cls, names: Sequence[str], io: IOSpec, settings: Mapping[str, Mapping[str, Any]]) -> Augmentation:
        """What `names` ask for.

        Raises:
            ConfigError: an option is unknown or wrong, or there is no map to shift.
        """
        made: dict[str, Any] = {name: validate(CONFIGS[name], settings.get(name, {}), where=f"augmentation {name}")
                                for name in names}
        grids = [spec.shape[-2:] for spec in io.inputs if len(spec.shape) == 3]
        if not grids and set(names) - {"flip"}:
            raise ConfigError("no input of this task is a map that could be moved", where="augment", found=names[-1])
        size = (grids[0][0], grids[0][1]) if grids else None
        return cls("flip" in made, size, made.get("translate"), made.get("crop"))

    def draw(self, batch: int, *, seed: int, step: int) -> Geometry:
        """The geometry of a whole step's `batch` samples."""
        flip_B = mirror_mask(batch, seed=seed, step=step)
        flip_B = flip_B if self.flip else np.zeros_like(flip_B)
        if self.translate is None and self.crop is None:
            return Geometry(flip_B)
        random_B5 = np.random.default_rng((seed, step, BOX_STREAM)).random((batch, 5))
        return Geometry(flip_B, self._boxes(random_B5))

    def _boxes(self, random_B5: Array) -> Array:
        """Boxes (B, 4) from uniform numbers: two for the shift, one for the side and two for the place of a crop."""
        box_B4 = np.tile([0.0, 0.0, 1.0, 1.0], (len(random_B5), 1))
        if self.crop is not None:
            side_B = self.crop.smallest + (1 - self.crop.smallest) * random_B5[:, 2]
            box_B4[:, :2] = random_B5[:, 3:] * (1 - side_B[:, None])
            box_B4[:, 2:] = side_B[:, None]
        if self.translate is not None:
            assert self.size is not None
            most = self.translate.cells // self.translate.step
            cells_B2 = (np.floor(random_B5[:, :2] * (2 * most + 1)) - most) * self.translate.step
            box_B4[:, :2] += shifted(*(cells_B2 / np.array(self.size)).T)[:, :2]
        return box_B4

    def alone(self) -> dict[str, Augmentation]:
        """Each transform by itself, by name."""
        found = {"flip": replace(self, translate=None, crop=None) if self.flip else None,
                 "translate": replace(self, flip=False, crop=None) if self.translate else None,
                 "crop": replace(self, flip=False, translate=None) if self.crop else None}
        return {name: each for name, each in found.items() if each is not None}


def pick(geometry: Geometry, index: Any) -> Geometry:
    """The rows `index` of a geometry."""
    return Geometry(geometry.flip[index], None if geometry.box_B4 is None else geometry.box_B4[index])


def mine(geometry: Geometry, labelled: int, part: int, accumulation: int) -> Geometry:
    """The geometry of one share: that of the labelled samples in front, then the others'."""
    places = np.arange(len(geometry.flip))
    pieces = [my_part(piece, part, accumulation) for piece in (places[:labelled], places[labelled:]) if len(piece)]
    return pick(geometry, np.concatenate(pieces))
