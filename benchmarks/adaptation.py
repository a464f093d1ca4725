"""What adapting few parameters is worth, against fine-tuning all of them with the same steps.

    python benchmarks/adaptation.py --demo DIR [--steps N] [--methods NAME ...] [--simulations N] [--out DIR]

DIR is the output of `fmdeploy demo`: its teacher is the frozen base and its dataset the source domain. The target
domain is the same traffic seen by another rig, planted here: a coarse lidar (2 m cells, a third of the returns lost,
free space not measured) that stands `SHIFT` m further ahead than it says, and a camera that does not see vehicles.
Every arm trains the same number of steps and draws the same share of each batch from the source (replay).

Targets: LoRA trains at most 2 % of the parameters, reaches at least 95 % of full fine-tuning on the target, and the
adapted network itself falls by at most 1 % on the source. With its adapter switched off a frozen teacher does not fall
at all. Then the recalibration of normalisation, without any label, on each planted change alone.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.config import StageConfig
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.data.writer import DatasetWriter
from fmdeploy.draft import Draft, produce
from fmdeploy.evaluate.bootstrap import Interval
from fmdeploy.manifest import Kind
from fmdeploy.models.saved import load_model
from fmdeploy.teacher.adapt.adapt import adapt, predict_with
from fmdeploy.teacher.adapt.effect import Effect, measure_effect
from fmdeploy.teacher.adapt.store import load_adapted
from fmdeploy.teacher.recalibrate import recalibrate
from fmdeploy.teacher.train import train

SHIFT = 2
GRID = 64
Change = Callable[[dict[str, Array], np.random.Generator], dict[str, Array]]
ARMS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "lora and bias-norm": {"method": "lora", "also": ("bias-norm",)},
    "lora, linear layers only": {"method": "lora", "convolutions": False, "rank": 3, "alpha": 6.0},
    "adapter": {"method": "adapter"},
    "prompt": {"method": "prompt"},
    "bias-norm": {"method": "bias-norm"},
    "head": {"method": "head"},
}


def coarse_lidar(planes: dict[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """Hits in cells of 2 m, a third of them lost, and no free space."""
    hit_TGG = planes["lidar_hit"]
    pooled = hit_TGG.reshape(len(hit_TGG), GRID // 2, 2, GRID // 2, 2).max(axis=(2, 4))
    pooled = pooled & (rng.random(pooled.shape) > 1 / 3)
    return {**planes, "lidar_hit": pooled.repeat(2, axis=1).repeat(2, axis=2),
            "lidar_free": np.zeros_like(planes["lidar_free"])}


def shifted_lidar(planes: dict[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """Everything the lidar says appears `SHIFT` cells ahead of where it is."""
    moved = {name: np.roll(planes[name], -SHIFT, axis=1) for name in ("lidar_hit", "lidar_free")}
    for plane_TGG in moved.values():
        plane_TGG[:, -SHIFT:] = 0
    return {**planes, **moved}


def blind_camera(planes: dict[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """The camera finds no vehicles."""
    return {**planes, "camera_vehicle": np.zeros_like(planes["camera_vehicle"])}


def half_the_beams(planes: dict[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """Every second ray of the lidar is missing: cells of every second of 128 sectors are unseen."""
    row, column = np.indices((GRID, GRID)) - GRID / 2 + 0.5
    seen_GG = (np.floor(np.arctan2(row, column) / (2 * np.pi) * 128).astype(int) % 2).astype(bool)
    return {**planes, **{name: planes[name] & seen_GG for name in ("lidar_hit", "lidar_free")}}


def thinned(planes: dict[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """Two of three cells of every sensor plane are lost."""
    kept = {n: p & (rng.random(p.shape) < 1 / 3) for n, p in planes.items() if n.startswith(("lidar", "camera"))}
    return {**planes, **kept}


def inverted_free(planes: dict[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """The lidar reports what is not free in place of what is."""
    return {**planes, "lidar_free": ~planes["lidar_free"]}


def other_rig(planes: dict[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """The target domain: all of it together."""
    return blind_camera(shifted_lidar(coarse_lidar(planes, rng), rng), rng)


SHIFTS: dict[str, Change] = {
    "half the beams": half_the_beams, "two of three cells lost": thinned, "free plane inverted": inverted_free,
    "no camera vehicles": blind_camera, "other rig": other_rig,
}


class RigConfig(StageConfig):
    """Which change is planted into which dataset."""

    change: str
    simulations: int
    seed: int = 0


def with_rig(data: Dataset, change: Change, out: Path, *, simulations: int) -> Artifact:
    """A DATASET of the first `simulations` of each split, as the other sensors see them; labels stay."""
    config = RigConfig(change=change.__name__, simulations=simulations)
    return produce(out, Kind.DATASET, stage="benchmark rig", config=config, inputs={"data": data.artifact},
                   build=lambda draft: _write(draft, data, change, simulations))


def _write(draft: Draft, data: Dataset, change: Change, simulations: int) -> None:
    writer, splits = DatasetWriter(draft), {}
    for split in data.splits:
        sequences = data.split(split)
        groups = list(dict.fromkeys(s.group for s in sequences))
        count = simulations if split == "train" else max(8, simulations // 2)
        spread = {groups[i] for i in np.linspace(0, len(groups) - 1, min(count, len(groups))).astype(int)}
        splits[split] = [s.id for s in sequences if s.group in spread]
    for number, sequence in enumerate(s for s in data.sequences if any(s.id in ids for ids in splits.values())):
        arrays = _changed(data.arrays(sequence), change, np.random.default_rng((7, number)))
        writer.add(sequence.id, arrays, {**sequence.metadata, "sensor_rig": change.__name__})
    writer.close(splits)


def _changed(arrays: Arrays, change: Change, rng: np.random.Generator) -> Arrays:
    names = [name for name in arrays if name.startswith(("lidar_", "camera_"))]
    planes = {name: np.unpackbits(arrays[name], axis=1).reshape(-1, GRID, GRID).astype(bool) for name in names}
    packed = {name: np.packbits(plane.reshape(len(plane), -1), axis=1) for name, plane in change(planes, rng).items()}
    return {**arrays, **packed}


def untouched(planes: dict[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """The source domain itself, cut to the same size."""
    return planes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3, help="of the adapted arms")
    parser.add_argument("--lr-full", type=float, default=1e-3, help="of full fine-tuning")
    parser.add_argument("--replay", type=float, default=0.5)
    parser.add_argument("--simulations", type=int, default=48)
    parser.add_argument("--methods", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--recalibrate", nargs="*", choices=list(SHIFTS), default=list(SHIFTS))
    parser.add_argument("--out", type=Path, help="keep the artifacts there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run(options, options.out or Path(name))


def run(options: argparse.Namespace, out: Path) -> None:
    whole, teacher = open_dataset(options.demo / "data"), open_artifact(options.demo / "teacher", Kind.TEACHER)
    source = with_rig(whole, untouched, out / "source", simulations=options.simulations).root
    target = with_rig(whole, other_rig, out / "target", simulations=options.simulations).root
    if options.methods:
        common = {"steps": options.steps, "batch": options.batch, "precision": "fp32", "data": target}
        print(f"  {'arm':<26}{'trained':>9}  {'target IoU':>12}{'':3}{'of full':>8}   fall on the source", flush=True)
        full = full_arm(options, teacher, source, target, out)
        for name in options.methods:
            tuned = adapt(teacher=teacher.root, out=out / name.replace(" ", "-").replace(",", ""), lr=options.lr,
                          replay_data=source, replay_share=options.replay, **ARMS[name], **common)
            share = tuned.json("metrics.json")["share"]
            _row(name, share, *_effects(teacher, load_adapted(teacher, tuned), source, target), full)
    for name in options.recalibrate or ():
        recalibration(name, options, teacher, whole, source, out)


def full_arm(options: argparse.Namespace, teacher: Artifact, source: Path, target: Path, out: Path) -> float:
    """Fine-tune everything on target and replayed source; its target metric."""
    both = mixed(open_dataset(source), open_dataset(target), out / "both", options.replay).root
    tuned = train(data=both, init=teacher.root, out=out / "full", lr=options.lr_full, steps=options.steps,
                  batch=options.batch, precision="fp32")
    effects = _effects(teacher, load_model(tuned), source, target)
    _row("no adaptation", 0.0, Effect(effects[0].metric, effects[0].before, effects[0].before),
         Effect(effects[1].metric, effects[1].before, effects[1].before), effects[0].after.value(effects[0].metric))
    full = effects[0].after.value(effects[0].metric)
    _row("full fine-tuning", 1.0, *effects, full)
    return full


class MixConfig(StageConfig):
    """Share of the source in the training data of full fine-tuning."""

    share: float


def mixed(source: Dataset, target: Dataset, out: Path, share: float) -> Artifact:
    """One DATASET whose train split is `share` source sequences and target ones for the rest: replay without a flag."""
    inputs = {"source": source.artifact, "target": target.artifact}
    return produce(out, Kind.DATASET, stage="benchmark mix", config=MixConfig(share=share), inputs=inputs,
                   build=lambda draft: _mix(draft, source, target, share))


def _mix(draft: Draft, source: Dataset, target: Dataset, share: float) -> None:
    writer = DatasetWriter(draft)
    ours, theirs = target.split("train"), source.split("train")
    count = round(len(ours) * share / (1 - share))
    chosen = [theirs[i] for i in np.linspace(0, len(theirs) - 1, count).astype(int)]
    names = []
    for prefix, data, sequences in (("target", target, ours), ("source", source, chosen)):
        for sequence in sequences:
            names.append(f"{prefix}-{sequence.id}")
            writer.add(names[-1], data.arrays(sequence), sequence.metadata)
    writer.close({"train": names})


def recalibration(
    name: str, options: argparse.Namespace, teacher: Artifact, whole: Dataset, source: Path, out: Path
) -> None:
    """Print what matching the moments of normalised features does after one planted change."""
    folder = name.replace(" ", "-")
    data = with_rig(whole, SHIFTS[name], out / f"shift-{folder}", simulations=options.simulations).root
    tuned = recalibrate(teacher=teacher.root, data=data, source_data=source, out=out / f"calm-{folder}")
    effect = measure_effect(predict_with(load_model(teacher), "fp32"), predict_with(load_model(tuned), "fp32"),
                            load_model(teacher).task, open_dataset(data))
    print(f"  recalibrated after {name:<26} {effect.before.value(effect.metric):.4f} to "
          f"{effect.after.value(effect.metric):.4f}, gain {_gain(effect.fall())}", flush=True)


def _effects(teacher: Artifact, tuned: Any, source: Path, target: Path) -> tuple[Effect, Effect]:
    before, after = predict_with(load_model(teacher), "fp32"), predict_with(tuned, "fp32")
    first, second = (measure_effect(before, after, tuned.task, open_dataset(data)) for data in (target, source))
    return first, second


def _row(name: str, share: float, target: Effect, source: Effect, full: float) -> None:
    value, fall = target.after.value(target.metric), source.fall()
    print(f"  {name:<26}{100 * share:>8.2f}%  {value:>12.4f}   {100 * value / full:>7.1f}%   {100 * fall.value:+.2f} % "
          f"[{100 * fall.low:+.2f}, {100 * fall.high:+.2f}]", flush=True)


def _gain(fall: Interval) -> str:
    return f"{-100 * fall.value:+.1f} % [{-100 * fall.high:+.1f}, {-100 * fall.low:+.1f}]"


if __name__ == "__main__":
    main()
