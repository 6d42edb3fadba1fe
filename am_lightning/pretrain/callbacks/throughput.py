"""TrainingMonitor: the scalars of a training except the momentum, and its duration."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from am_lightning.lightning import AdaptiveMemory
from am_lightning.optim.base import AdaptiveMemoryOptimizer
from am_lightning.optim.gradient_clipping import clip_grad_norm_
from am_lightning.optim.unwrap import unwrap_optimizer
from am_lightning.pretrain.model.shape import LlamaShape, flops_per_token
from am_lightning.pretrain.runtime.errors import RecipeError, require, require_counts


class TrainingMonitor(Callback):
    """Logs the training's scalars every `trainer.log_every_n_steps` optimizer steps. Between them the host never waits.

    `train/loss` (nats per token) and `train/perplexity` are means over the micro-batches of the step and over all
    processes. `throughput/tokens_per_second` counts all processes and excludes validations. `throughput/tokens` is the
    number of tokens that were read so far. `throughput/tflops_per_device` counts the model's operations, 6 N + 12 L h s
    per token, and `throughput/mfu` is its share of the peak of the device, if that is known. `train/grad_norm` is the
    global gradient norm before clipping. It is left out if the AdaptiveMemory callback logs `am/grad_norm`.

    A loss that is not finite at a logged step ends the run on all ranks, unless an AdaptiveMemory callback counts the
    steps that its optimizer skips (`max_consecutive_skips`).

    Args:
        window_size: number of logged points that throughput is averaged over.
        peak_flops: peak of one device in the precision of the run, in operations per second; default: what Lightning
            knows about the GPU. A CPU has no default, so there is no MFU.

    Attributes:
        seconds: duration of the training in this process, with the validations during it.

    Raises:
        RecipeError: if an argument is out of range; from `fit` on all ranks, if the loss is not finite.
    """

    def __init__(self, window_size: int = 20, peak_flops: float | None = None) -> None:
        require_counts("monitor", window_size=window_size)
        if peak_flops is not None:
            require(0 < peak_flops < math.inf, "monitor.peak_flops", peak_flops, "> 0, or null")
        self.window_size, self.peak_flops = window_size, peak_flops
        self.seconds = self._validation_seconds = 0.0
        self._start = self._validation_start = 0.0
        self._steps = 0  # since the fit began
        self._loss: Tensor | None = None  # sum over the step's micro-batches so far, on this process
        self._norm: Tensor | None = None
        self._last_step = 0
        self._times: deque[tuple[float, int]] = deque()  # (seconds of training, steps) at the last logged points

    @property
    def steps_per_second(self) -> float | None:
        """Optimizer steps per second without the validations. None if no step was done."""
        training = self.seconds - self._validation_seconds
        return self._steps / training if self._steps and training > 0 else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.peak_flops is None:
            self.peak_flops = get_available_flops(trainer.strategy.root_device, _matmul_dtype(str(trainer.precision)))
        self._loss = self._norm = None
        self._last_step, self._steps = trainer.global_step, -trainer.global_step
        self._times = deque([(0.0, trainer.global_step)], maxlen=self.window_size + 1)
        self._validation_seconds = 0.0
        self._start = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validation_seconds += time.perf_counter() - self._validation_start

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = time.perf_counter() - self._start
        self._steps += trainer.global_step

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Compute the norm here, where the gradient is complete, unscaled and not clipped yet."""
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
        metrics |= self._throughput(trainer, cast(LlamaShape, pl_module.shape))
        pl_module.log_dict(metrics)  # replaces the module's train/loss, which covers one micro-batch only

    def _refuse_not_finite(self, trainer: L.Trainer, loss: float) -> None:
        """Raise an error if the loss is not finite. All ranks raise it, because they have the same mean."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if math.isfinite(loss) or any(isinstance(callback, AdaptiveMemory) for callback in callbacks):
            return
        raise RecipeError(
            f"train/loss is {loss:g} at step {trainer.global_step}, and without am_lightning.AdaptiveMemory in"
            f" trainer.callbacks nothing counts such steps. Resume from a checkpoint before step {self._times[-1][1]},"
            " the last logged one with a finite loss, and lower the learning rate or set trainer.gradient_clip_val."
        )

    def tokens_per_second(self, trainer: L.Trainer) -> float | None:
        """Return the throughput over the last logged points, for the progress bar. None before the first step."""
        seconds, steps = self._times[0] if self._times else (0.0, 0)
        elapsed, done = self._training_seconds() - seconds, trainer.global_step - steps
        return done * _tokens_per_step(trainer) / elapsed if done and elapsed > 0 else None

    def _training_seconds(self) -> float:
        return time.perf_counter() - self._start - self._validation_seconds

    def _is_due(self, trainer: L.Trainer, step: int) -> bool:
        """Return whether the Trainer logs after this step, too."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(every) and (step % every == 0 or trainer.should_stop)

    def _throughput(self, trainer: L.Trainer, shape: LlamaShape) -> dict[str, float]:
        rate = self.tokens_per_second(trainer)
        self._times.append((self._training_seconds(), trainer.global_step))
        found = {"throughput/tokens": float(trainer.global_step * _tokens_per_step(trainer))}
        if rate is not None:
            flops = rate * flops_per_token(shape) / trainer.world_size
            found |= {"throughput/tokens_per_second": rate, "throughput/tflops_per_device": flops / 1e12}
            if self.peak_flops:
                found["throughput/mfu"] = flops / self.peak_flops
        return found


def _tokens_per_step(trainer: L.Trainer) -> int:
    """Return the tokens of an optimizer step, over all processes and micro-batches."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return int(data.batch_size * data.seq_len)


def perplexity(loss: float) -> float:
    """Return exp of a loss in nats, or inf if it is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan


def _matmul_dtype(precision: str) -> torch.dtype:
    """Return the dtype of matrix products under a Lightning precision ("bf16-mixed", "32-true", ...)."""
    names = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return names.get(precision.split("-")[0], torch.float32)


@torch.no_grad()
def gradient_norm(trainer: L.Trainer, optimizer: Optimizer) -> Tensor | None:
    """Return the 2-norm over all parameters of the model, a 0-dim tensor on the device. Call it on every rank.

    Returns:
        None if something else computes the norm: DeepSpeed's engine, or AdaptiveMemory's clipping, which logs
        `am/grad_norm`.
    """
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return None
    inner = unwrap_optimizer(optimizer)
    if isinstance(inner, AdaptiveMemoryOptimizer):
        clips = bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm != "value"
        return None if clips else clip_grad_norm_(inner, float("inf"))
    alike: dict[object, list[Tensor]] = defaultdict(list)  # one norm cannot mix meshes and placements
    for grad in (p.grad for group in inner.param_groups for p in group["params"] if p.grad is not None):
        alike[(grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None].append(grad)
    squares = torch.zeros((), device="cpu")
    for grads in alike.values():
        norm = torch.nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        squares = squares.to(norm.device) + norm.float().square()
    model = trainer.strategy.model
    if isinstance(model, FullyShardedDataParallel) and model.sharding_strategy != ShardingStrategy.NO_SHARD:
        torch.distributed.all_reduce(squares, group=model.process_group)  # each rank has a shard of each flat gradient
    return squares.sqrt()
