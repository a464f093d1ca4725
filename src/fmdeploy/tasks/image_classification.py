"""Task `image-classification`: arrays `image` and `label`, for your own small data.

Subclass it and set the class attributes; see `examples/digits`.

Legend: B batch, C channels, H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fmdeploy.errors import ConfigError
from fmdeploy.evaluate.frequency import frequencies
from fmdeploy.evaluate.metrics import Accuracy, TopLabelECE, target_of
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.task import Metric, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

KD_TEMPERATURE = 2.0
SIZES: dict[str, Any] = {"dim": 64, "depth": 2, "heads": 2, "activation_checkpointing": False}


class ImageClassification(Task):
    """One image in, logits over classes out.

    Attributes:
        image_shape: (C, H, W) of the float32 array `image`.
        num_classes: Values of the integer array `label` are 0 to this, exclusive.
        value_range: Of the pixels.
        preprocessing: How a sensor's image becomes this array.
    """

    name = "image-classification"
    teacher_layer = "tokens"
    student_layer = "trunk"
    image_shape: tuple[int, int, int] = (3, 32, 32)
    num_classes: int = 10
    value_range: tuple[float, float] = (0.0, 1.0)
    preprocessing: str = "pixels scaled to the value range"
    weighs_samples = True

    @property
    def io(self) -> IOSpec:
        """`image` float32 (C, H, W) to `logits` float32 (classes,)."""
        image = TensorSpec(name="image", shape=self.image_shape, layout="CHW", value_range=self.value_range)
        logits = TensorSpec(name="logits", shape=(self.num_classes,), layout="C")
        return IOSpec(inputs=(image,), outputs=(logits,), preprocessing=self.preprocessing)

    def metrics(self) -> tuple[Metric, ...]:
        """Accuracy, and the calibration error of the top label."""
        return Accuracy(output="logits", target="label"), TopLabelECE("ece", output="logits", target="label")

    def events(self) -> tuple[Metric, ...]:
        """Each class."""
        return frequencies("logits", "label", [str(k) for k in range(self.num_classes)])

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        """Cross entropy of logits (B, classes) against labels (B,)."""
        from fmdeploy.training.losses import class_loss

        return class_loss(outputs["logits"], target_of(targets, "label"), targets.get("sample_weight"))

    def distillation_loss(self, outputs: dict[str, Tensor], teacher_outputs: dict[str, Tensor]) -> Tensor:
        """KL divergence at temperature 2 (arXiv:1503.02531)."""
        from fmdeploy.training.losses import kl_divergence

        return kl_divergence(outputs["logits"], teacher_outputs["logits"], temperature=KD_TEMPERATURE)

    def teacher(self, options: Mapping[str, Any]) -> nn.Module:
        """A vision transformer behind a convolutional stem, for square images; options as in `SIZES`."""
        from fmdeploy.models.blocks import GROUPS
        from fmdeploy.models.classifier import TransformerClassifier

        sizes = {**SIZES, **options}
        if unknown := sorted(set(sizes) - set(SIZES)):
            raise ConfigError(f"has no size {unknown[0]!r}", where="teacher", expected=", ".join(SIZES))
        if sizes["dim"] % sizes["heads"] or sizes["dim"] % GROUPS:
            raise ConfigError("the sizes do not fit together", where="teacher", found=sizes,
                              expected=f"dim a multiple of heads and of {GROUPS}")
        if self.image_shape[1] != self.image_shape[2]:
            raise ConfigError("the built-in teacher takes square images", where=f"task {self.name}",
                              found=self.image_shape, fix="Override the task's method `teacher`")
        return TransformerClassifier(self.image_shape[0], self.num_classes, self.image_shape[1], **sizes)

    def student(self, name: str, options: Mapping[str, Any]) -> nn.Module:
        """`cnn` or `depthwise` (options `width`, `blocks`), or anything `models.factory` knows."""
        from fmdeploy.models.classifier import CnnClassifier
        from fmdeploy.models.depthwise import DepthwiseClassifier
        from fmdeploy.models.factory import make_student

        built_in = {
            "cnn": lambda chosen: CnnClassifier(self.image_shape[0], self.num_classes, **chosen),
            "depthwise": lambda chosen: DepthwiseClassifier(self.image_shape[0], self.num_classes, **chosen),
        }
        return make_student(name, options, self.io, built_in)
