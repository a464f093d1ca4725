"""Your own data, your own networks: scikit-learn's handwritten digits, from a teacher to a gated INT8 bundle."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fmdeploy.data.from_arrays import write_arrays
from fmdeploy.distill.distill import distill
from fmdeploy.evaluate.report import report
from fmdeploy.export.export import export
from fmdeploy.quantize.quantize import quantize
from fmdeploy.runtime.check.check import check
from fmdeploy.tasks.image_classification import ImageClassification
from fmdeploy.teacher.train import train


class Residual(nn.Module):  # plain PyTorch from here to Network: it never heard of fmdeploy
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x + self.second(self.first(x)))


class Network(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.trunk = nn.Sequential(*(Residual(width) for _ in range(depth)), nn.MaxPool2d(2))
        self.head = nn.Linear(width * 16, 10)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(self.stem(image)).flatten(1))
        return logits


class Digits(ImageClassification):  # the task: what goes in, what comes out, which networks
    name = "digits"
    image_shape, num_classes = (1, 8, 8), 10
    preprocessing = "8 x 8 grey values, 0..16, divided by 16"
    teacher_layer = student_layer = "trunk"

    def teacher(self, options: Mapping[str, Any]) -> nn.Module:
        return Network(width=48, depth=3)

    def student(self, name: str, options: Mapping[str, Any]) -> nn.Module:
        return Network(width=12, depth=1)


def main(out: Path) -> None:
    digits = load_digits()  # 1797 images that ship with scikit-learn: nothing is downloaded
    order = np.random.default_rng(0).permutation(len(digits.target))
    image = (digits.images[:, None] / 16).astype(np.float32)
    splits = {"train": order[:900], "val": order[900:1000], "test": order[1000:]}
    data = write_arrays(out / "data", {"image": image, "label": digits.target.astype(np.int64)}, splits).root

    task = {"task": "digits:Digits", "data": data, "mirror": False, "precision": "fp32", "batch": 32}
    teacher = train(**task, out=out / "teacher", steps=250).root
    student = distill(**task, teacher=teacher, out=out / "student", labels=0.1, steps=400).root
    scratch = distill(**task, out=out / "scratch", labels=0.1, steps=400).root  # the same, without a teacher
    quantized = quantize(student=student, data=data, out=out / "quantized").root
    limits = Path(__file__).with_name("budgets.toml")
    bundle = export(model=quantized, data=data, budgets=limits, out=out / "bundle").root
    verdict = check(bundle=bundle, data=data, out=out / "check")
    everything = (data, teacher, student, scratch, quantized, bundle, out / "check")
    report(artifacts=everything, out=out / "report.html", title="Digits: from teacher to INT8")
    print("\n".join(verdict.lines))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/digits"))
