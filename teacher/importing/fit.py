"""Foreign names and shapes against a network's own: which prefix to strip, what is missing, what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fmdeploy.errors import ModelFileError

SHOWN = 3


@dataclass(frozen=True)
class Fit:
    """How a set of tensors fits a network.

    Attributes:
        prefix: Stripped from the foreign names.
        state: Tensors that fit, by the network's names.
        missing: The network wants them, and they are not there.
        unexpected: They stand below a part of the network, which has no such tensor.
        misshapen: Name to (shape of the network's, shape that was found).
        left: Others that the network has no part for: optimiser states, heads of another task.
    """

    prefix: str
    state: dict[str, Tensor]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    left: tuple[str, ...] = field(default=())

    @property
    def whole(self) -> bool:
        """Whether every tensor of the network was found, in its shape, and none too many."""
        return not (self.missing or self.unexpected or self.misshapen)

    def as_metrics(self) -> dict[str, Any]:
        """For metrics.json: counts, and the first names of each."""
        return {
            "prefix": self.prefix, "loaded": len(self.state), "missing": len(self.missing),
            "unexpected": len(self.unexpected), "misshapen": len(self.misshapen), "left": len(self.left),
            "first_missing": list(self.missing[:SHOWN]), "first_unexpected": list(self.unexpected[:SHOWN]),
            "first_misshapen": sorted(self.misshapen)[:SHOWN], "first_left": list(self.left[:SHOWN]),
        }

    def complaint(self) -> str:
        """What does not fit, in one line."""
        parts = [f"{len(names)} {what} ({_few(names)})" for what, names in
                 (("missing", self.missing), ("unexpected", self.unexpected)) if names]
        shapes = [f"{name} {list(mine)} found {list(theirs)}" for name, (mine, theirs) in self.misshapen.items()]
        return "; ".join([*parts, *([f"{len(shapes)} of another shape ({_few(shapes)})"] if shapes else [])])


def fit_to(network: nn.Module, tensors: Mapping[str, Tensor]) -> Fit:
    """Match foreign tensors to a network under whichever prefix fits most of it.

    Prefixes are what stands in front of names that the network knows (`module.`, `state_dict.teacher.backbone.`).
    """
    own = network.state_dict()
    prefix = _best_prefix(set(own), tensors)
    theirs = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    misshapen = {name: (tuple(own[name].shape), tuple(theirs[name].shape)) for name in own
                 if name in theirs and own[name].shape != theirs[name].shape}
    parts = {name.partition(".")[0] for name in own}
    strange = [name for name in theirs if name not in own]
    return Fit(
        prefix=prefix, state={name: theirs[name] for name in own if name in theirs and name not in misshapen},
        missing=tuple(name for name in own if name not in theirs),
        unexpected=tuple(name for name in strange if name.partition(".")[0] in parts), misshapen=misshapen,
        left=(*(name for name in strange if name.partition(".")[0] not in parts),
              *(name for name in tensors if not name.startswith(prefix))),
    )


def _best_prefix(own: set[str], tensors: Mapping[str, Tensor]) -> str:
    counts: dict[str, int] = {"": 0}
    for name in tensors:
        pieces = name.split(".")
        for cut in range(len(pieces)):
            if ".".join(pieces[cut:]) in own:
                prefix = ".".join(pieces[:cut]) + "." if cut else ""
                counts[prefix] = counts.get(prefix, 0) + 1
    return max(sorted(counts), key=lambda prefix: counts[prefix])


def load_fit(network: nn.Module, fit: Fit, *, partial: bool, where: object) -> None:
    """Copy what fits into the network, in its own dtype.

    Raises:
        ModelFileError: something does not fit and `partial` was not asked for; nothing fits; a value is not finite.
    """
    if not fit.state and not fit.misshapen:
        raise ModelFileError("fits this network nowhere", where=where, expected=_few(network.state_dict()),
                             found=_few(fit.left or fit.unexpected or tuple(fit.misshapen)))
    if not fit.whole and not (partial and fit.state):
        raise ModelFileError(f"does not fit the network: {fit.complaint()}", where=where,
                             fix="Give its sizes (--dim, --depth, ...), or take what fits with --partial")
    for name, value in fit.state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ModelFileError(f"{name} holds values that are not finite", where=where)
    own = network.state_dict()
    with torch.no_grad():
        for name, value in fit.state.items():
            own[name].copy_(value)


def _few(names: Iterable[str]) -> str:
    found = list(names)
    more = len(found) - SHOWN
    return ", ".join(name[:80] for name in found[:SHOWN]) + (f" and {more} more" if more > 0 else "") or "none"
