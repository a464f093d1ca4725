"""The training loop: AdamW, warm-up and decay, clipping, mixed precision, accumulation, averaging, checkpoints.

A run is a function of its configuration alone. Every random choice is keyed by (seed, step), so a run that was
killed goes on from its last checkpoint to the very same weights, and two processes compute what one would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmdeploy.arrays import Arrays
from fmdeploy.errors import ConfigError, InputError
from fmdeploy.progress import Bar, progress, say
from fmdeploy.training.checkpoint import TrainingState, latest_checkpoint, load_checkpoint, save_checkpoint
from fmdeploy.training.config import TrainingConfig
from fmdeploy.training.device import make_accelerator, unwrap
from fmdeploy.training.distributed import add_up_gradients, mean_over_ranks, shares_memory, world
from fmdeploy.training.ema import WeightAverage
from fmdeploy.training.loader import Prefetcher
from fmdeploy.training.log import StepLog
from fmdeploy.training.schedule import learning_rate, make_optimizer, set_rate
from fmdeploy.training.sharding import Shards, flag_kept, sharding_plugin, whole
from fmdeploy.training.shared_norm import keeps_own_buffers, share_batch_norm
from fmdeploy.training.timing import TIMING_LOG, Stopwatch
from fmdeploy.training.timing import Timing as Timing
from fmdeploy.training.validation import BestState, Validation
from fmdeploy.training.watch import LossWatch

Batch = dict[str, Arrays]  # such as {"inputs": {...}, "targets": {...}}, every array (B, ...)
Tensors = dict[str, dict[str, Tensor]]  # the same on the device
Losses = dict[str, Tensor]
FLUSH_EVERY = 10  # steps between looks at the loss: a GPU would have to wait for each


class DivergedError(InputError):
    """The loss or its gradient became NaN or infinite, or the loss grew and stayed there."""


class StoppedError(InputError):
    """Raised by `Job.after_step`, in all processes alike: the run is not worth going on with.

    Attributes:
        seen: Scalars of that step, for the log: what it was stopped for.
    """

    def __init__(self, *args: Any, seen: Mapping[str, Tensor] | None = None, **facts: Any) -> None:
        super().__init__(*args, **facts)
        self.seen = dict(seen or {})


@dataclass(frozen=True)
class Job:
    """What is trained, on what.

    Attributes:
        title: For messages and the progress bar.
        model: Parameters that want a gradient are trained, in place.
        batch: (step, part) to one process's share of a step, made in numpy in a background thread.
        losses: Named scalar parts of the loss of one such share; their sum is minimised. Called with the wrapped
            model, whose forward runs in the configured precision and returns float32.
        folder: Where checkpoints go.
        log: The JSON-lines log.
        validation: How it is judged on the way; the best state stays. None: the last one stays.
        after_step: Called with the step's number after each optimiser step; its scalars go to the log. It may raise
            a `StoppedError`.
        resting: Parameters that a step does not train although their gradient is zero and not None: weight decay and
            momentum leave them alone.
        told: Whether to say on stderr how fast it was and how long it waited for data.
    """

    title: str
    model: nn.Module
    batch: Callable[[int, int], Batch]
    losses: Callable[[nn.Module, Tensors], Losses]
    folder: Path
    log: Path
    validation: Validation | None = None
    after_step: Callable[[int], Mapping[str, Tensor]] | None = None
    resting: Callable[[int], Iterable[nn.Parameter]] | None = None
    told: bool = True


def fit(job: Job, config: TrainingConfig) -> Timing:
    """Train `job.model` for `config.steps` steps, from the last checkpoint in `job.folder` if there is one.

    Afterwards the model holds the averaged weights when `config.ema` is set, else the last ones; or, where the job has
    a validation, the best ones that it saw.

    Raises:
        ConfigError: it cannot be sharded here.
        DivergedError: the loss is not finite, or grew and stayed there; the last good checkpoint stays.
        StoppedError: `job.after_step` says so; the log ends with that step.
    """
    return Run(job, config).train()


def to_tensors(batch: Batch, device: torch.device) -> Tensors:
    """The arrays of a batch as tensors on `device`; on the CPU they share their memory."""
    return {
        kind: {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}
        for kind, arrays in batch.items()
    }


class Run:
    """One call of `fit`: the state that its small steps share."""

    def __init__(self, job: Job, config: TrainingConfig) -> None:
        self.job, self.config = job, config
        plugin = sharding_plugin(job.model) if config.sharding == "fsdp" else None
        if plugin is not None and job.validation is not None:
            raise ConfigError("a run that is judged on its way cannot be sharded", where=job.title,
                              fix="Leave --sharding out")
        with flag_kept():
            self.accelerator = make_accelerator(config.precision, plugin)
        self.model = share_batch_norm(job.model).to(self.accelerator.device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.shards = Shards(self.model) if plugin is not None else None
        optimizer = make_optimizer(self.model, config)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.adds_up = self.shards is None and not keeps_own_buffers(self.model) and shares_memory(self.model)
        if self.shards is not None:
            self.shards.cut(self.accelerator)
        average = WeightAverage(self.model, config.ema) if config.ema else None
        best = BestState() if job.validation is not None else None
        self.watch = LossWatch(config.divergence)
        self.state = TrainingState(self.model, optimizer, average, self.accelerator.scaler, best, self.watch)
        self.start = self._resume()
        self.log = StepLog(job.log if world()[0] == 0 else None, self.start)
        self.pending: list[dict[str, Any]] = []

    def _resume(self) -> int:
        found = latest_checkpoint(self.job.folder)
        return load_checkpoint(found, self.state, self.accelerator.device) if found else 0

    def train(self) -> Timing:
        """All remaining steps; see `fit`."""
        config = self.config
        over = self._judge(self.start) if self.start == 0 else False
        loader = Prefetcher(self._make, self._keys())
        done = self.start
        self.clock = Stopwatch(lambda: loader.waited_s, self.job.folder / TIMING_LOG if world()[0] == 0 else None)
        self.model.train()
        try:
            with progress(self.job.title, total=config.steps, done=self.start) as bar:
                while done < config.steps and not over:
                    self.step(done, loader.take)
                    done += 1
                    over = self._judge(done)
                    self._account(done, bar, last=over or done == config.steps)
        finally:
            loader.close()
            unwrap(self.accelerator, self.wrapped, self.model)
        timing = replace(self.clock.total(done - self.start), processes=world()[1], sharding=config.sharding)
        if self.job.told and timing.steps and world()[0] == 0:
            say(timing.sentence(self.job.title))
        return self._finish(timing, done)

    def _finish(self, timing: Timing, done: int) -> Timing:
        """Put the state that stays into the model."""
        best = self.state.best
        if best is not None:
            best.copy_to(self.model)
            return replace(timing, judged=tuple(best.judged), best_step=best.step)
        if self.state.average is not None:
            self.state.average.copy_to(self.model)
        if self.shards is not None:
            self.shards.join()
        return replace(timing, best_step=done)

    def _judge(self, done: int) -> bool:
        """Judge the state after `done` steps where one is due, and say whether to stop."""
        rule, best = self.job.validation, self.state.best
        if rule is None or best is None or (done % rule.every and done != self.config.steps):
            return False
        kept = self.state.average and WeightAverage(self.model, 0.0)  # a copy of what is trained
        if self.state.average is not None:
            self.state.average.copy_to(self.model)
        score = rule.score(self.model)
        best.take(self.model, done, score)
        if kept:
            kept.copy_to(self.model)
        self.model.train()
        if self.pending:
            self.pending[-1]["validation"] = torch.tensor(score, device=self.accelerator.device)
        return best.exhausted(rule.patience)

    def _keys(self) -> Iterator[int]:
        return iter(range(self.start * self.config.accumulation, self.config.steps * self.config.accumulation))

    def _make(self, key: int) -> Batch:
        return self.job.batch(*divmod(key, self.config.accumulation))

    def step(self, step: int, take: Callable[[], Batch]) -> None:
        """One optimiser step on the batches that `take` gives, one for each part."""
        torch.manual_seed((self.config.seed << 32) + step * world()[1] + world()[0])
        rate = learning_rate(step, self.config)
        set_rate(self.state.optimizer, rate)
        parts: Losses = {}
        for part in range(self.config.accumulation):
            for name, value in self._backward(take(), part).items():
                parts[name] = parts.get(name, 0) + value.detach() / self.config.accumulation
        noted = {"step": step, "lr": rate, "grad_norm": self._update(step).detach(), **parts}
        try:
            seen = self.job.after_step(step) if self.job.after_step is not None else {}
        except StoppedError as error:
            self._note(noted, error.seen)
            self.log.write(self._noted())
            raise
        self._note(noted, seen)

    def _update(self, step: int) -> Tensor:
        """Move the weights along the gradients of all parts and processes, whose norm before clipping is returned."""
        if self.adds_up:
            add_up_gradients(self.model)
        norm: Tensor = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for parameter in self.job.resting(step) if self.job.resting is not None else ():
            parameter.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.state.average is not None:
            self.state.average.update(self.model, step)
        return norm

    def _note(self, noted: Mapping[str, Any], seen: Mapping[str, Tensor]) -> None:
        both = {**noted, **seen}
        self.pending.append({name: whole(x) if isinstance(x, Tensor) else x for name, x in both.items()})

    def _noted(self) -> list[dict[str, float]]:
        """What was noted since the last time, as numbers; all processes must ask."""
        records = [_plain(record) for record in self.pending]
        self.pending = []
        return records

    def _backward(self, batch: Batch, part: int) -> Losses:
        last = part == self.config.accumulation - 1
        tensors = to_tensors(batch, self.accelerator.device)
        with nullcontext() if last and not self.adds_up else self.accelerator.no_sync(self.wrapped):
            parts = self.job.losses(self.wrapped, tensors)
            total = torch.stack(list(parts.values())).sum()
            self.accelerator.backward(total / (self.config.accumulation * (world()[1] if self.adds_up else 1)))
        return {"loss": total, **parts}

    def _account(self, done: int, bar: Bar, *, last: bool) -> None:
        save = done % self.config.checkpoint_every == 0 and not last
        if save or done % FLUSH_EVERY == 0 or last:
            self._flush(bar, done)
        if save and not self.watch.alarmed:
            save_checkpoint(self.job.folder, self.state, done, write=self.accelerator.is_main_process)

    def _flush(self, bar: Bar, done: int) -> None:
        records = self._noted()
        self.log.write(records)
        for record in records:
            if not self._is_finite(record):
                raise self._diverged(f"the loss or its gradient is not finite at step {int(record['step'])}")
            if self.watch.diverges(int(record["step"]), record["loss"]):
                raise self._diverged(
                    f"the loss grew at step {self.watch.since} and stayed above {self.watch.bound:.4g}, "
                    f"{self.config.divergence:g} times its median, for {self.watch.high} steps")
        share = self.clock.lap(done, len(records))
        bar.advance(len(records), loss=records[-1]["loss"], data_wait=share)

    def _is_finite(self, record: Mapping[str, float]) -> bool:
        """Checked before a checkpoint is written. A gradient scaler skips steps whose gradient overflows: no fault."""
        scaled = self.accelerator.scaler is not None
        return math.isfinite(record["loss"]) and (scaled or math.isfinite(record["grad_norm"]))

    def _diverged(self, what: str) -> DivergedError:
        found = latest_checkpoint(self.job.folder)
        kept = f"The last good checkpoint is {found.name}" if found else "No checkpoint was written yet"
        return DivergedError(
            what, where=self.job.title,
            fix=f"{kept}. Start over with a smaller --lr (now {self.config.lr:g}) or --precision fp32",
        )


def _plain(record: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of one step, the losses averaged over all processes."""
    losses = {k: v for k, v in record.items() if isinstance(v, Tensor)}
    values = mean_over_ranks(torch.stack([v.float() for v in losses.values()])).tolist()
    return {"step": record["step"], "lr": record["lr"], **dict(zip(losses, values, strict=True))}
