"""Callbacks that watch a run: the scalars of the training besides the momentum, and a clock for the summary."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.optim import Optimizer

from am_lightning.lightning import AdaptiveMemory
from am_lightning.pretrain.callbacks.gradient_norm import gradient_norm
from am_lightning.pretrain.model.shape import LlamaShape, flops_per_token
from am_lightning.pretrain.runtime.errors import RecipeError, require, require_counts


class TrainingClock(Callback):
    """Seconds and optimizer steps of the training in this process, with and without the validations within it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.validation_seconds = 0.0
        self.steps = 0
        self._start = self._validation_start = 0.0

    @property
    def steps_per_second(self) -> float | None:
        """Without the validations; None where no step was taken."""
        training = self.seconds - self.validation_seconds
        return self.steps / training if self.steps and training > 0 else None

    def training_seconds(self) -> float:
        """Since training began, without the validations."""
        return time.perf_counter() - self._start - self.validation_seconds

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.steps = -trainer.global_step
        self.validation_seconds = 0.0
        self._start = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.validation_seconds += time.perf_counter() - self._validation_start

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = time.perf_counter() - self._start
        self.steps += trainer.global_step


class TrainingMonitor(TrainingClock):
    """Logs the training's scalars every `trainer.log_every_n_steps` optimizer steps; in between the host never waits.

    `train/loss` (nats per token) and `train/perplexity` are of the whole step: the mean over its micro-batches and over
    all processes, which reduce it together. `throughput/tokens_per_second` is of all processes, without validations,
    and `throughput/tokens` what they have read in all; `throughput/tflops_per_device` counts the model's operations
    (6 N + 12 L h s for a token) and `throughput/mfu` is its share of the device's peak, where that is known.
    `train/grad_norm` is the gradient's global norm before clipping; where the AdaptiveMemory callback already logs
    `am/grad_norm`, it is left to it.

    A loss that is not finite at a logged step ends the run on all ranks, unless there is an AdaptiveMemory callback,
    which counts the steps that its optimizer drops (`max_consecutive_skips`).

    Args:
        window_size: logged points that throughput is a mean over.
        peak_flops: of one device, per second, in the run's precision; None: what Lightning knows of the GPU, and
            no MFU on a CPU.

    Raises:
        RecipeError: an argument is out of range; from `fit`, on all ranks: the loss is not finite.
    """

    def __init__(self, window_size: int = 20, peak_flops: float | None = None) -> None:
        super().__init__()
        require_counts("monitor", window_size=window_size)
        if peak_flops is not None:
            require(0 < peak_flops < math.inf, "monitor.peak_flops", peak_flops, "> 0, or null")
        self.window_size, self.peak_flops = window_size, peak_flops
        self._loss: Tensor | None = None  # of the micro-batches of this step so far, this process
        self._norm: Tensor | None = None
        self._last_step = 0
        self._times: deque[tuple[float, int]] = deque()  # (seconds of training, steps) at the last logged points

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.peak_flops is None:
            self.peak_flops = get_available_flops(trainer.strategy.root_device, _matmul_dtype(str(trainer.precision)))
        self._loss = self._norm = None
        self._last_step = trainer.global_step
        self._times = deque([(0.0, trainer.global_step)], maxlen=self.window_size + 1)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """The gradient is whole here, unscaled, and not clipped yet."""
        self._norm = gradient_norm(trainer, optimizer) if self._is_due(trainer, trainer.global_step + 1) else None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"].detach()  # Lightning has divided it by the number of micro-batches
        self._loss = loss if self._loss is None else self._loss + loss
        if trainer.global_step == self._last_step:  # gradient accumulation: no step yet
            return
        self._last_step = trainer.global_step
        whole, self._loss = self._loss, None
        if not self._is_due(trainer, trainer.global_step):
            return
        mean = float(trainer.strategy.reduce(whole, reduce_op="mean"))  # waits for the device, so the clock is right
        self._refuse_not_finite(trainer, mean)
        metrics = {"train/loss": mean, "train/perplexity": perplexity(mean)}
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            self._norm = trainer.strategy.deepspeed_engine.get_global_grad_norm()
        if self._norm is not None:
            metrics["train/grad_norm"] = float(self._norm)
        metrics |= self._throughput(trainer, pl_module)
        pl_module.log_dict(metrics)  # its train/loss takes the place of the module's, which is of one micro-batch

    def _refuse_not_finite(self, trainer: L.Trainer, loss: float) -> None:
        """The same on all ranks, which have the same mean."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if math.isfinite(loss) or any(isinstance(callback, AdaptiveMemory) for callback in callbacks):
            return
        raise RecipeError(
            f"train/loss is {loss:g} at step {trainer.global_step}, and without am_lightning.AdaptiveMemory in"
            f" trainer.callbacks nothing counts such steps. Resume from a checkpoint before step {self._times[-1][1]},"
            " the last logged one with a finite loss, and lower the learning rate or set trainer.gradient_clip_val."
        )

    def tokens_per_second(self, trainer: L.Trainer) -> float | None:
        """Since the last logged points, for the progress bar; None before the first step."""
        seconds, steps = self._times[0] if self._times else (0.0, 0)
        elapsed, done = self.training_seconds() - seconds, trainer.global_step - steps
        return done * tokens_per_step(trainer) / elapsed if done and elapsed > 0 else None

    def _is_due(self, trainer: L.Trainer, step: int) -> bool:
        """The Trainer logs after this step, too."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(every) and (step % every == 0 or trainer.should_stop)

    def _throughput(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        rate = self.tokens_per_second(trainer)
        self._times.append((self.training_seconds(), trainer.global_step))
        found = {"throughput/tokens": float(trainer.global_step * tokens_per_step(trainer))}
        if rate is None:
            return found
        found["throughput/tokens_per_second"] = rate
        shape = pl_module.shape
        assert isinstance(shape, LlamaShape)
        flops = rate * flops_per_token(shape) / trainer.world_size
        found["throughput/tflops_per_device"] = flops / 1e12
        if self.peak_flops:
            found["throughput/mfu"] = flops / self.peak_flops
        return found


def tokens_per_step(trainer: L.Trainer) -> int:
    """Of an optimizer step, all processes and micro-batches together."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return int(data.batch_size * data.seq_len)


def perplexity(loss: float) -> float:
    """exp of a loss in nats; inf where it is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan


def _matmul_dtype(precision: str) -> torch.dtype:
    """What matrices are multiplied in under a Lightning precision ("bf16-mixed", "32-true", ...)."""
    names = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return names.get(precision.split("-")[0], torch.float32)
