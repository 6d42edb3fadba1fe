"""LossGuard: what happens when the loss or a gradient is not finite, and when the loss jumps."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim.optimizer import Optimizer

from am_lightning.optim.unwrap import am_optimizers
from am_lightning.pretrain.checkpoints import saved_step
from am_lightning.pretrain.checkpoints.resume import STEPS, newest_first
from am_lightning.pretrain.runtime.errors import RecipeError, require


class LossGuard(L.Callback):
    """Drops steps whose gradients are not finite, ends a run that is beyond help, and tells of jumps of the loss.

    AMAdamW and AMSGD drop such a step by themselves, without waiting for the device. For any other optimizer this
    callback does: it takes the gradients away, so that neither weights nor moments change; that costs one look at all
    gradients and one wait for the device in a step. (Not under a 16-bit gradient scaler and DeepSpeed, who do it.)

    The loss of every step, its mean over the ranks, is looked at every `check_every_n_steps`: one all-reduce, after
    which all ranks know and do the same.

    Args:
        max_bad_steps: so many steps in a row that were dropped or whose loss is not finite end the run.
        check_every_n_steps: optimizer steps between two looks; a run may go on for so long after the last straw.
        window: steps over which the mean and the spread of the loss are taken.
        sigmas: a loss above mean + sigmas * standard deviation is a spike.
        on_spike: "warn"; "stop", where the loss stays there for `spike_steps` in a row; "ignore".
        spike_steps: for "stop".

    Raises:
        RecipeError: an argument is out of range; on all ranks, when the run is ended: names the checkpoint to go on
            from and what to change.
    """

    def __init__(
        self,
        max_bad_steps: int = 20,
        check_every_n_steps: int = 10,
        window: int = 100,
        sigmas: float = 8.0,
        on_spike: Literal["warn", "stop", "ignore"] = "warn",
        spike_steps: int = 10,
    ) -> None:
        counts = {
            "max_bad_steps": max_bad_steps,
            "check_every_n_steps": check_every_n_steps,
            "spike_steps": spike_steps,
        }
        for name, value in counts.items():
            require(value >= 1, f"loss_guard.{name}", value, "a whole number >= 1")
        require(window >= 10, "loss_guard.window", window, "a whole number >= 10")
        require(sigmas > 0, "loss_guard.sigmas", sigmas, "> 0")
        require(on_spike in ("warn", "stop", "ignore"), "loss_guard.on_spike", on_spike, "warn, stop or ignore")
        self.max_bad_steps, self.check_every_n_steps = max_bad_steps, check_every_n_steps
        self.window, self.sigmas, self.on_spike, self.spike_steps = window, sigmas, on_spike, spike_steps
        self._losses: deque[float] = deque(maxlen=window)  # of steps that were neither bad nor a spike
        self._bad = self._high = 0  # in a row, up to now
        self._micro: list[Tensor] = []  # of the step that is under way
        self._unread: list[Tensor] = []  # (loss, dropped) of steps, on the device
        self._dropped = False
        self._last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_step = trainer.global_step
        self._micro, self._unread = [], []

    # ------------------------------------------------------------------ dropping
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Any optimizer passes over parameters without a gradient."""
        self._dropped = False
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if scaled or isinstance(trainer.strategy, DeepSpeedStrategy) or any(am_optimizers([optimizer])):
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        bad = _not_finite(gradients, trainer.strategy.root_device)
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce(bad, reduce_op="max")
        if int(bad):
            self._dropped = True
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    # ------------------------------------------------------------------ looking
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._micro.append(loss.detach().float().reshape(()))
        if trainer.global_step == self._last_step:  # gradient accumulation: no step yet
            return
        self._last_step = trainer.global_step
        if self._micro:
            self._unread.append(torch.stack([torch.stack(self._micro).mean(), self._was_dropped(trainer)]))
        self._micro = []
        if self._unread and trainer.global_step % self.check_every_n_steps == 0:
            self._look(trainer)

    def _was_dropped(self, trainer: L.Trainer) -> Tensor:
        dropped = torch.full_like(self._micro[0], float(self._dropped))  # filled there: no copy that waits
        for optimizer in am_optimizers(trainer.optimizers):
            dropped = torch.maximum(dropped, optimizer.last_step_skipped.to(dropped))
        return dropped

    def _look(self, trainer: L.Trainer) -> None:
        seen = torch.stack(self._unread)
        if trainer.world_size > 1:
            seen = trainer.strategy.reduce(seen, reduce_op="mean")
        self._unread = []
        first = trainer.global_step - len(seen) + 1
        for step, (loss, dropped) in enumerate(seen.tolist(), start=first):
            if dropped or not math.isfinite(loss):
                self._count_bad(trainer, step, loss)
            else:
                self._bad = 0
                self._count_spike(trainer, step, loss)

    def _count_bad(self, trainer: L.Trainer, step: int, loss: float) -> None:
        self._bad += 1
        if self._bad == 1:
            rank_zero_warn(f"step {step} was dropped: its loss ({loss:g}) or a gradient is not finite")
        if self._bad >= self.max_bad_steps:
            raise RecipeError(
                f"{self._bad} steps in a row, up to step {step}, had a loss ({loss:g}) or gradient that is not finite"
                f" and were dropped; loss_guard.max_bad_steps is {self.max_bad_steps}."
                f" {_advice(trainer, step - self._bad)}"
            )

    def _count_spike(self, trainer: L.Trainer, step: int, loss: float) -> None:
        usual = len(self._losses) == self.window and self.on_spike != "ignore"
        mean = fmean(self._losses) if usual else math.inf
        if not usual or loss <= mean + self.sigmas * pstdev(self._losses):
            self._high = 0
            self._losses.append(loss)
            return
        self._high += 1
        text = f"the loss jumped to {loss:.4g} at step {step}, from {mean:.4g} in the {self.window} steps before"
        if self._high == 1:
            rank_zero_warn(text)
        if self._high < self.spike_steps:
            return
        if self.on_spike == "stop":
            text += f", and stayed there for {self._high} steps (loss_guard.spike_steps)"
            raise RecipeError(f"{text}. {_advice(trainer, step - self._high)}")
        self._losses.clear()  # the new normal
        self._high = 0

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "bad": self._bad, "high": self._high}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses = deque(state_dict["losses"], maxlen=self.window)
        self._bad, self._high = state_dict["bad"], state_dict["high"]


def _not_finite(gradients: list[Any], device: torch.device) -> Tensor:
    """1 where an element of this rank's pieces is not finite, else 0; int32."""
    local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
    filled = [g for g in local if g.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.int32, device=device)
    largest = torch.stack([norm.to(device) for norm in torch._foreach_norm(filled, float("inf"))])
    return (~largest.isfinite().all()).to(torch.int32)


def _advice(trainer: L.Trainer, good_step: int) -> str:
    """The newest checkpoint of `good_step` or before, and what to change."""
    folder = Path(str(getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir))
    change = "lower the learning rate, clip gradients (trainer.gradient_clip_val), or look at the data of these steps"
    for path in newest_first([*folder.glob(STEPS)]):
        if saved_step(path) <= good_step:
            return f"Go on from before, --ckpt_path {path}, and change something: {change}."
    return f"No checkpoint is from before step {good_step + 1}: start anew, and change something: {change}."
