"""What a kept world model (or flow) says of the test samples' future, beside what then was seen.

Legend: N samples, T later frames, H W cells, G codes of a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fmdeploy.arrays import Array
from fmdeploy.errors import ArtifactError
from fmdeploy.task import Samples
from fmdeploy.tasks.bev_occupancy_samples import BevSamples
from fmdeploy.teacher.objectives import rollout
from fmdeploy.teacher.objectives.base import Objective
from fmdeploy.teacher.objectives.flow import Flow, reduced
from fmdeploy.teacher.objectives.nextcodes import MAX_FRAMES
from fmdeploy.teacher.objectives.store import load_objective
from fmdeploy.teacher.objectives.worldmodel import WorldModel
from fmdeploy.teacher.probe.view import NotMeasuredError, View
from fmdeploy.training.device import evaluation_mode

SPLIT = "test"
MOST = 320  # samples: a rollout costs far more than a forward pass
BATCH = 32
DRAWS = 3
AHEAD = range(1, MAX_FRAMES + 1)
SECONDS = 0.2  # between frames


@dataclass(frozen=True)
class Futures:
    """Predictions and truths at some frames after the present one.

    Attributes:
        offsets: The frames (T).
        index: Numbers of the samples, int64 (N,).
        said: Predicted probability that something is seen, float32 (N, T, H, W).
        seen: What the sensors then showed, uint8 (N, T, H, W).
        labelled: Where vehicles then were, seen or not, uint8 (N, T, H, W).
        now: What the sensors show at present, uint8 (N, 1, H, W).
    """

    offsets: tuple[int, ...]
    index: Array
    said: Array
    seen: Array
    labelled: Array
    now: Array

    def persistence(self) -> Array:
        """The present, said of every frame to come: (N, T, H, W)."""
        return np.broadcast_to(self.now, self.seen.shape)

    def at(self, offsets: tuple[int, ...]) -> Futures:
        """Some of the frames only.

        Raises:
            NotMeasuredError: the model does not predict one of them.
        """
        if missing := [offset for offset in offsets if offset not in self.offsets]:
            raise NotMeasuredError(f"the model does not predict +{SECONDS * missing[0]:.1f} s")
        place = [self.offsets.index(offset) for offset in offsets]
        return Futures(offsets, self.index, self.said[:, place], self.seen[:, place], self.labelled[:, place], self.now)


@dataclass(frozen=True)
class Codes:
    """How well a world model foretold the true codes: nats and share right, (N, T); and what it said (N, T, H, W)."""

    nats: Array
    right: Array
    said: Array


def kept(view: View, name: str) -> Objective:
    """The objective `name` that travels with the probed TEACHER.

    Raises:
        NotMeasuredError: there is none.
    """
    return view.once(("kept", name), lambda: _kept(view, name))


def _kept(view: View, name: str) -> Objective:
    artifact, loaded = view.subject.artifact, view.subject.loaded
    if artifact is None or loaded is None or loaded.recipe.role != "teacher":
        raise NotMeasuredError("only a TEACHER keeps a world model")
    try:
        found = load_objective(artifact, loaded, name)
    except ArtifactError as error:
        raise NotMeasuredError(f"{error.what}. {error.fix}" if error.fix else error.what) from error
    return found.to(next(loaded.module.parameters()).device)


def chosen(view: View) -> Array:
    """Numbers of the samples to predict: at most MOST, evenly over the chosen ones."""
    index = view.index(SPLIT)
    if len(index) <= MOST:
        return index
    return index[np.linspace(0, len(index) - 1, MOST).round().astype(np.int64)]


def futures(view: View) -> Futures:
    """Of the kept world model, or of the kept flow where there is none.

    Raises:
        NotMeasuredError: neither is kept.
    """
    try:
        return world_futures(view)
    except NotMeasuredError as error:
        if view.subject.artifact is None or view.subject.loaded is None:
            raise
        try:
            return view.once("futures of flow", lambda: _flow_futures(view))
        except NotMeasuredError:
            raise error from None


def world_futures(view: View) -> Futures:
    """Of the kept world model, all frames up to +1.6 s, told the ego's true motion where it was trained with that.

    Raises:
        NotMeasuredError: none is kept.
    """
    return view.once("futures of worldmodel", lambda: _world_futures(view))


def _world_futures(view: View) -> Futures:
    kept(view, "worldmodel")
    index, samples = chosen(view), _recorded(view)
    said = codes(view, "true").said
    return Futures(tuple(AHEAD), index, said, _seen(samples, index, AHEAD), samples.occupancy(index, AHEAD),
                   _seen(samples, index, (0,)))


def codes(view: View, motion: str) -> Codes:
    """What the kept world model says when it is told the `true` motion, that of `others`, or `zero`.

    Raises:
        NotMeasuredError: none is kept.
    """
    model = cast(WorldModel, kept(view, "worldmodel"))
    return view.once(("codes", motion), lambda: _codes(view, model, motion))


def told(samples: BevSamples, index: Array, motion: str) -> Array:
    """The motion (N, T, 3) to tell a model: `true`, `zero`, or of `others`: samples half the split away."""
    if motion == "zero":
        return np.zeros((len(index), MAX_FRAMES, 3), np.float32)
    source = np.roll(index, len(index) // 2) if motion == "others" else index
    return samples.motion(source, AHEAD)


def _codes(view: View, model: WorldModel, motion: str) -> Codes:
    samples, index, found = _recorded(view), chosen(view), []
    actions = told(samples, index, motion) if model.config.actions else None
    teacher = _teacher(view)
    for part, place in _parts(index):
        with evaluation_mode(teacher), evaluation_mode(model):
            device = next(model.parameters()).device
            planes = torch.from_numpy(samples.frames(part, AHEAD)).to(device)
            true_BTG = model.vae.codes(planes.flatten(0, 1).float()).view(len(part), len(AHEAD), -1)
            state_BND = model.tokens(teacher, _inputs(samples, part, device))
            moved = None if actions is None else torch.from_numpy(actions[place]).to(device)
            score = rollout.code_scores(model, state_BND, true_BTG, moved)
            said = rollout.rollout(model, state_BND, motion_BT3=moved, draws=DRAWS).occupied_BTHW
        found.append([each.float().cpu().numpy() for each in (*score, said)])
    return Codes(*(np.concatenate(each) for each in zip(*found, strict=True)))


def _flow_futures(view: View) -> Futures:
    flow = cast(Flow, kept(view, "flow"))
    samples, index, said, teacher = _recorded(view), chosen(view), [], _teacher(view)
    later = tuple(offset for offset in flow.config.horizons if offset > 0)
    if not later:
        raise NotMeasuredError("the flow was trained on the present alone")
    place = [flow.config.horizons.index(offset) for offset in later]
    for part, _ in _parts(index):
        device = next(flow.parameters()).device
        said.append(flow.predict_future(teacher, _inputs(samples, part, device)).float().cpu().numpy()[:, place])
    coarse: Callable[[Array], Array] = lambda planes: reduced(planes, flow.config.reduce)  # noqa: E731 - one word below
    return Futures(later, index, np.concatenate(said), coarse(_seen(samples, index, later)),
                   coarse(samples.occupancy(index, later)), coarse(_seen(samples, index, (0,))))


def _seen(samples: BevSamples, index: Array, offsets: Any) -> Array:
    """What the sensors show as another road user, uint8 (N, T, H, W)."""
    rows = []
    for part, _ in _parts(index):
        planes = samples.frames(part, offsets)
        rows.append(np.bitwise_or.reduce(planes[:, :, list(rollout.OCCUPIED)], axis=2))
    return np.concatenate(rows)


def _recorded(view: View) -> BevSamples:
    samples: Samples = view.samples(SPLIT)
    if not isinstance(samples, BevSamples):
        raise NotMeasuredError("the samples have no frames to predict")
    return samples


def _teacher(view: View) -> nn.Module:
    assert view.subject.loaded is not None  # else `kept` has refused
    return view.subject.loaded.module


def _inputs(samples: BevSamples, part: Array, device: torch.device) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(x)).to(device) for name, x in samples.batch(part)[0].items()}


def _parts(index: Array) -> Iterator[tuple[Array, slice]]:
    for at in range(0, len(index), BATCH):
        yield index[at : at + BATCH], slice(at, at + BATCH)
