"""Few-shot rungs: fine-tune everything on the labels of a few simulations, beside the same from random weights.

Both runs take equal steps over equal batches at equal rates, and are judged on the same test samples: the gain is
paired. Whole simulations are labelled, since frames of one simulation say nearly the same.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from fmdeploy.evaluate.evaluation import evaluate
from fmdeploy.models import input_list, named_outputs, predictor
from fmdeploy.subset import Subset
from fmdeploy.teacher.probe.base import Bench, Judged, NotMeasuredError, StatisticsRung, View
from fmdeploy.training.batches import SupervisedBatches
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.labelled import labelled_index
from fmdeploy.training.loop import DivergedError, Job, Losses, Tensors, fit
from fmdeploy.training.mixture.options import Mixture

RATE, BATCH = 1e-3, 16


class FewShot(StatisticsRung):
    """The task's primary metric after fine-tuning on a tenth of the train simulations."""

    name = "few-shot"
    metric_name = "primary metric"
    optional = True
    share: ClassVar[float] = 0.1

    def judge(self, view: View, bench: Bench) -> Judged:
        """See `StatisticsRung.judge`."""
        task, index = view.subject.task, view.index("test")
        train = view.samples("train")
        labelled = Subset(train, labelled_index(train, self.share, bench.seed))
        tuned = fine_tuned(view, labelled, bench)
        metric = task.metrics()[0]
        found = evaluate(predictor(tuned, task.io), Subset(view.samples("test"), index), [metric])
        chosen = {"simulations": len(np.unique(labelled.groups)), "samples": len(labelled),
                  "steps": bench.few_shot_steps}
        return Judged(view.evaluation(metric, found.stats[metric.name]), chosen=chosen, metric=metric)


def fine_tuned(view: View, labelled: Subset, bench: Bench) -> torch.nn.Module:
    """A copy of the network after supervised steps on `labelled`.

    Raises:
        NotMeasuredError: it cannot be trained as it is, or diverges.
    """
    if view.subject.module is None or not view.subject.can_train:
        raise NotMeasuredError("cannot be fine-tuned as it is: give the TEACHER or STUDENT that it was made from")
    task, module = view.subject.task, copy.deepcopy(view.subject.module)

    def losses(model: torch.nn.Module, batch: Tensors) -> Losses:
        outputs = named_outputs(task.io, model(*input_list(task.io, batch["inputs"])))
        return {"supervised": task.loss(outputs, batch["targets"])}

    config = TrainingConfig(steps=bench.few_shot_steps, batch=BATCH, lr=RATE, seed=bench.seed, precision="fp32",
                            checkpoint_every=bench.few_shot_steps)
    with tempfile.TemporaryDirectory() as folder:
        where, batches = Path(folder), SupervisedBatches(task, Mixture(labelled), config)
        try:
            fit(Job(f"few-shot, {view.subject.name}", module, batches, losses, folder=where / "checkpoints",
                    log=where / "log.jsonl", told=False), config)
        except DivergedError as error:
            raise NotMeasuredError(f"fine-tuning diverged: {error.what}") from error
    return module.eval()


class FewShotFive(FewShot):
    """The same on a twentieth."""

    name = "few-shot-5"
    share = 0.05
