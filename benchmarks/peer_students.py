"""The students that the accuracy of PTQ is compared on, trained with fmdeploy's own stages and kept in a folder.

    bev-cnn, bev-vit         the demo's task, recorded by `fmdeploy demo`
    digits-cnn, digits-vit   examples/digits, its own network and a plain-torch vision transformer

Legend: B batch, C channels, H W rows and columns, N tokens, D embedding, A heads.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.data.format import Dataset, open_dataset
from fmdeploy.distill.distill import distill
from fmdeploy.manifest import Kind

ROOT = Path(__file__).resolve().parents[1]
STUDENTS = ("bev-cnn", "bev-vit", "digits-cnn", "digits-vit")


class Block(nn.Module):
    """A pre-norm transformer block (arXiv:2010.11929)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Map (B, N, D) to the same shape."""
        q_BNAD, k_BNAD, v_BNAD = self.qkv(self.norm1(x_BND)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q_BAND, k_BAND, v_BAND = (t.transpose(1, 2) for t in (q_BNAD, k_BNAD, v_BNAD))
        weights_BANN = torch.softmax(q_BAND @ k_BAND.transpose(2, 3) * q_BAND.shape[-1] ** -0.5, dim=-1)
        x_BND = x_BND + self.proj((weights_BANN @ v_BAND).transpose(1, 2).flatten(2))
        y_BND: Tensor = x_BND + self.down(F.gelu(self.up(self.norm2(x_BND))))
        return y_BND


class DigitsVit(nn.Module):
    """Patches of 2 x 2 pixels of an 8 x 8 image, three blocks, a linear head on the mean token."""

    def __init__(self, dim: int = 48, depth: int = 3, heads: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, dim, 2, stride=2)
        self.position = nn.Parameter(torch.randn(1, 16, dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.trunk = nn.Identity()  # a name for the feature loss to hook: (B, D, 4, 4)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 1, 8, 8)."""
        x_BND = self.blocks(self.patch(image_BCHW).flatten(2).transpose(1, 2) + self.position)
        grid_BDHW = self.trunk(x_BND.transpose(1, 2).unflatten(2, (4, 4)))
        logits_BC: Tensor = self.head(self.norm(grid_BDHW.flatten(2).mean(2)))
        return logits_BC


def digits_vit() -> nn.Module:
    """What `distill --student peer_students:digits_vit` calls."""
    return DigitsVit()


def student(name: str, work: Path, demo: Path | None) -> tuple[Artifact, Dataset]:
    """The student called `name` and its data; what is missing is made in `work`.

    Args:
        name: One of `STUDENTS`.
        work: Folder that keeps what was trained.
        demo: Folder of a finished `fmdeploy demo`; made in `work` where it is not given.
    """
    task, _, kind = name.partition("-")
    folder = bev(work, demo, kind) if task == "bev" else digits(work, kind)
    data = (demo or work / "demo") / "data" if task == "bev" else work / "digits" / "data"
    return open_artifact(folder, Kind.STUDENT), open_dataset(data)


def bev(work: Path, demo: Path | None, kind: str) -> Path:
    """The student of the demo's task."""
    home = demo or work / "demo"
    if not (home / "student").exists():
        from fmdeploy.demo import demo as run_demo

        run_demo(out=home)
    if kind == "cnn":
        return home / "student"
    out = work / "bev-vit"
    if not out.exists():
        distill(data=home / "data", out=out, student="vit", steps=500, labels=1.0)
    return out


def digits(work: Path, kind: str) -> Path:
    """The student of examples/digits, or the transformer beside it."""
    for folder in (ROOT / "examples" / "digits", ROOT / "benchmarks"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))  # tasks and students are named as module:attribute
    home, out = work / "digits", work / "digits" / kind
    if not (home / "data").exists():
        write_digits(home / "data")
    common: dict[str, Any] = {"task": "digits:Digits", "data": home / "data", "mirror": False, "precision": "fp32",
                              "batch": 32}
    if not out.exists():
        vit = {"student": "peer_students:digits_vit", "lr": 1e-3, "steps": 1500}
        distill(**common, out=out, **(vit if kind == "vit" else {"steps": 400}))
    return out


def write_digits(out: Path) -> None:
    """The data of examples/digits: 900 training, 100 validation and 797 test images."""
    from sklearn.datasets import load_digits

    from fmdeploy.data.from_arrays import write_arrays

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    image = (found.images[:, None] / 16).astype(np.float32)
    splits = {"train": order[:900], "val": order[900:1000], "test": order[1000:]}
    write_arrays(out, {"image": image, "label": found.target.astype(np.int64)}, splits)
