"""Convert a module's AdamW into AMAdamW and log its momentum, with a callback for Lightning's Trainer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch

import am_lightning.lightning.compat as pl
from am_lightning.lightning.compat import DeepSpeedStrategy, MisconfigurationException, rank_zero_info, rank_zero_warn
from am_lightning.lightning.fabric import attach
from am_lightning.lightning.loggers import StatsLogger
from am_lightning.lightning.patched_methods import PatchedMethods
from am_lightning.lightning.trainer_patches import (
    allow_in_deepspeed,
    bind_module,
    check_of_engine,
    patch_trainer,
    unwrapped,
)
from am_lightning.loggers.reader import prefix_of, settings_of
from am_lightning.optim.argument_hints import LAMBDA, with_hints
from am_lightning.optim.base import AdaptiveMemoryOptimizer
from am_lightning.optim.convert import convert_adamw, is_adam, what_to_return
from am_lightning.optim.unwrap import am_optimizers
from am_lightning.optim.validation import SCOPES, check_choice, check_count, check_flag, check_number

__all__ = ["AdaptiveMemory", "attach"]

_OPTIMIZERS = "the optimizer's own: give it to torch.optim.AdamW in configure_optimizers"
_HINTS = {
    **dict.fromkeys(("lr", "learning_rate", "weight_decay", "eps", "beta2", "fused", "foreach"), _OPTIMIZERS),
    **dict.fromkeys(("beta1", "beta", "betas", "beta_max", "momentum", "cap"), "the cap of beta_t is beta1_max=..."),
    **dict.fromkeys(LAMBDA, "write lambd=..."),
    **dict.fromkeys(("every", "log_every", "log_interval"), "write log_every_n_steps=..."),
}


class _StateKey(property):
    """Raise an error that names the class if a Trainer was given the class instead of an object."""

    def __get__(self, callback: Any, cls: type | None = None) -> Any:
        if callback is None and cls is not None:
            raise AttributeError(f"{cls.__name__} is a class, and callbacks holds objects: write {cls.__name__}()")
        return super().__get__(callback, cls)


class SkippedStepsError(RuntimeError):
    """Raised on all ranks after ``max_consecutive_skips`` consecutive steps were dropped and a checkpoint written."""


class AdaptiveMemory(pl.Callback):
    """Train with adaptive memory and log the momentum: ``Trainer(callbacks=[AdaptiveMemory()])``.

    The callback converts every ``torch.optim.AdamW``, and every Adam without coupled weight decay, that
    ``configure_optimizers`` returns or that the Trainer is given in mid-run. It converts them in place, so schedulers,
    manual optimization and the user's references keep working. If a module returns AMAdamW or AMSGD, it only logs.
    beta_t is the same on one device and under DDP, FSDPStrategy, ModelParallelStrategy (FSDP2, tensor parallel, both)
    and DeepSpeedStrategy (ZeRO 0 to 3), because the callback tells the optimizer where its parameters are. Clipping by
    norm (``Trainer(gradient_clip_val=...)``, ``self.clip_gradients``) calls ``am_lightning.clip_grad_norm_``, which is
    correct under all of them, except under DeepSpeed, whose engine clips.

    Args:
        lambd: memory regularisation lambda. Default: 0.1.
        beta1_max: cap of beta_t. None: max(0, b - (1 - b) lambd), where b is the AdamW's beta1 (0.9 gives 0.89).
        scope: one beta_t for each "tensor" or "group", or "global" for the model. Default: "tensor".
        per_layer: log curves of each layer to a TensorBoardLogger if there are at most 32 layers; "all": for any
            number of layers. The heat map always shows all layers. Default: True.
        histogram: log the histogram of beta_t over the tensors to a TensorBoardLogger. Default: True.
        log_every_n_steps: log interval in steps. None: the Trainer's interval.
        max_consecutive_skips: number of consecutive dropped steps that ends the run after a checkpoint. Default: 100.

    Logs ``am/beta/mean|min|max``, ``am/beta/<layer group>``, ``am/clamp/at_max|at_zero`` (shares of tensors),
    ``am/skipped_steps`` and, if gradients are clipped by norm, ``am/grad_norm`` (before clipping) to every logger. The
    tags of a second optimizer start with ``am-1/``.

    Raises:
        TypeError, ValueError: if an argument is of the wrong type or out of range.
        MisconfigurationException: at the start of fit, if an optimizer cannot be converted or the strategy is not
            supported.
        SkippedStepsError (a RuntimeError): from ``fit``, on all ranks, after ``max_consecutive_skips`` dropped steps.
    """

    @with_hints(_HINTS, "AdaptiveMemory(beta1_max=...), or lambd=...; it takes neither a module nor an optimizer")
    def __init__(
        self,
        *,
        lambd: float = 0.1,
        beta1_max: float | None = None,
        scope: str = "tensor",
        per_layer: bool | Literal["all"] = True,
        histogram: bool = True,
        log_every_n_steps: int | None = None,
        max_consecutive_skips: int = 100,
    ) -> None:
        check_number("lambd", lambd)
        if beta1_max is not None:
            check_number("beta1_max", beta1_max, upper=1, open_upper=True)
        check_choice("scope", scope, SCOPES)
        if per_layer != "all":
            check_flag("per_layer", per_layer)
        check_flag("histogram", histogram)
        if log_every_n_steps is not None:
            check_count("log_every_n_steps", log_every_n_steps)
        check_count("max_consecutive_skips", max_consecutive_skips)
        self.lambd, self.beta1_max, self.scope = lambd, beta1_max, scope
        self.per_layer, self.histogram = per_layer, histogram
        self.log_every_n_steps = log_every_n_steps
        self.max_consecutive_skips = max_consecutive_skips
        self._patches = PatchedMethods()  # active during a fit
        self._live: list[Any] = []  # the optimizers that the strategy was last given
        self._untold: list[tuple[AdaptiveMemoryOptimizer, str]] = []  # not yet reported, with the original class
        self._fitting = False
        self._readers: list[StatsLogger] = []
        self._saved: dict[str, Any] = {}  # state in the checkpoint that this fit resumes
        self._at_end: dict[str, Any] = {}  # state at the end of the last fit
        self._last_step = 0
        self._steps = 0  # in this fit
        self._next_look = 0  # step of the next look at the count of skipped steps
        self._batches = 0  # batches up to the last one that made a step, in all fits
        self._intervals = 0  # finished log intervals

    @_StateKey
    def state_key(self) -> str:
        """The key of the callback's state in a checkpoint."""
        return super().state_key

    # ------------------------------------------------------------------ conversion
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Patch the strategy so that it converts the optimizers it is given, at the start of fit and in mid-run."""
        self._leave()
        if stage != "fit":
            return
        strategy = trainer.strategy
        self._patches.add(strategy, "optimizers", partial(self._take, trainer))
        if isinstance(strategy, DeepSpeedStrategy):
            allow_in_deepspeed(strategy)
            self._patches.add(strategy, "_init_optimizers", partial(self._take_for_engine, trainer))
        patch_trainer(trainer, self._patches)
        self._readers, self._saved = [], {}

    def on_after_setup(self, **_: Any) -> None:
        """Refuse ``Fabric(callbacks=[AdaptiveMemory()])``, which would convert nothing."""
        raise TypeError(
            "AdaptiveMemory is a callback of Lightning's Trainer, and does nothing in Fabric: build am_adamw(model, "
            "lr=...) before fabric.setup, and call am_lightning.lightning.attach(fabric, model, optimizer) after it"
        )

    def _leave(self) -> None:
        """Restore the methods of the strategy and its precision plugin, and drop the optimizers."""
        self._patches.undo()
        self._live, self._untold, self._fitting = [], [], False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Clean up, because Lightning calls no teardown after an exception, and no on_train_end after Ctrl-C."""
        if self._fitting and not isinstance(exception, Exception):
            self._conclude(trainer)
        self._leave()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Undo the patches, and keep the counts for a checkpoint that is saved after fit."""
        self._leave()
        if stage == "fit":
            self._at_end, self._readers = self.state_dict(), []

    def _take(self, trainer: pl.Trainer, original: Callable[[list[Any]], None], optimizers: list[Any]) -> None:
        """Convert the assigned ``strategy.optimizers`` before Lightning's wrappers copy their class, which changes."""
        optimizers = unwrapped(optimizers)
        if isinstance(trainer.strategy, DeepSpeedStrategy):  # the engine has already wrapped them
            if self._fitting:
                check_of_engine(trainer.strategy, optimizers)
        elif optimizers:
            self._convert(trainer, optimizers)
        original(optimizers)
        self._live = list(optimizers)
        if self._fitting:
            self._follow(trainer)

    def _take_for_engine(self, trainer: pl.Trainer, original: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """Convert the optimizer before DeepSpeed's engine is built around it."""
        optimizer, schedule = original()
        self._convert(trainer, [optimizer])
        return optimizer, schedule

    def _convert(self, trainer: pl.Trainer, optimizers: list[Any]) -> None:
        ready = [o for o in optimizers if isinstance(o, AdaptiveMemoryOptimizer)]
        plain = [o for o in optimizers if is_adam(o)]
        if not ready and not plain:
            optimizers = [o for o in optimizers if o.param_groups]  # Lightning's stand-in for None has no groups
            found = ", ".join(type(o).__name__ for o in optimizers) or "no optimizer"
            if optimizers:
                found += f" ({'; '.join(dict.fromkeys(map(what_to_return, optimizers)))})"
            raise MisconfigurationException(
                f"AdaptiveMemory found nothing to convert: the Trainer was given {found}. Return torch.optim.AdamW, "
                "Adam without weight decay, AMAdamW or AMSGD from configure_optimizers, or remove the callback."
            )
        new = [o for o in optimizers if o not in self._live]
        for other in new:
            if other not in plain and other not in ready:
                rank_zero_info(f"AdaptiveMemory leaves {type(other).__name__} as it is: {what_to_return(other)}")
        converted = self._convert_each([o for o in new if o in plain], ready)
        own = [o for o in new if o in ready]
        if own and not converted and (self.lambd, self.beta1_max, self.scope) != (0.1, None, "tensor"):
            rank_zero_warn(
                "AdaptiveMemory only logs here, because the module returns an adaptive memory optimizer itself: "
                "the callback's lambd, beta1_max and scope are not used."
            )
        self._untold += [(optimizer, type(optimizer).__name__) for optimizer in own]
        for optimizer in (*converted, *own):  # a LearningRateFinder makes steps before on_fit_start
            bind_module(optimizer, trainer, trainer.lightning_module)

    def _convert_each(
        self, plain: list[torch.optim.AdamW | torch.optim.Adam], ready: list[AdaptiveMemoryOptimizer]
    ) -> list[AdaptiveMemoryOptimizer]:
        converted: list[AdaptiveMemoryOptimizer] = []
        for optimizer in plain:
            name = type(optimizer).__name__
            try:
                made = convert_adamw(optimizer, lambd=self.lambd, beta1_max=self.beta1_max, scope=self.scope)
            except ValueError as error:
                others = ready or converted or optimizer is not plain[-1]
                if isinstance(optimizer, torch.optim.AdamW) or not others:
                    raise MisconfigurationException(f"AdaptiveMemory cannot convert this optimizer: {error}") from error
                rank_zero_warn(f"AdaptiveMemory leaves {name} as it is beside the other optimizers: {error}")
            else:
                converted.append(made)
                self._untold.append((made, name))
        return converted

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Create the readers of the optimizers, which exist now, and attach to DeepSpeed's engine."""
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            from am_lightning.deepspeed import attach as attach_engine

            attach_engine(trainer.strategy.model)
        elif not trainer.optimizers:
            self._convert(trainer, [])
        self._readers, self._fitting, self._steps = [], True, 0
        self._follow(trainer)
        self._count_from_checkpoint()

    def _follow(self, trainer: pl.Trainer) -> None:
        """Create readers of the current optimizers. A new optimizer takes over the counts of the one it replaces."""
        before, self._readers = self._readers, []
        for index, optimizer in enumerate(am_optimizers(trainer.optimizers)):
            prefix = prefix_of(index)
            reader = StatsLogger(optimizer, prefix, per_layer=self.per_layer, histogram=self.histogram)
            same = next((old for old in before if old.optimizer is optimizer), None)
            if same is not None:
                reader = same if same.prefix == prefix else reader
                reader.skipped_before = same.skipped_before
            elif index < len(before):
                reader.load_state_dict(before[index].state_dict())
            self._readers.append(reader)
        self._next_look = self._steps + self.max_consecutive_skips
        while self._untold:
            optimizer, name = self._untold.pop(0)
            kind = type(optimizer).__name__
            what = f"the module's own {kind}" if name == kind else f"{name} is now {kind}"
            rank_zero_info(f"AdaptiveMemory: {what} ({settings_of(optimizer)})")

    def _look_again(self, trainer: pl.Trainer) -> None:
        """Detect changes of the list itself (``trainer.optimizers[0] = ...``), which the strategy does not see."""
        now = trainer.optimizers
        if len(now) != len(self._live) or any(a is not b for a, b in zip(now, self._live, strict=True)):
            trainer.strategy.optimizers = now

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count steps from the Trainer's ``global_step``, which a resumed run takes from its checkpoint."""
        self._last_step = trainer.global_step

    # ------------------------------------------------------------------ curves and skipped steps
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Convert optimizers that were replaced since the last batch, and start the intervals before the first step."""
        self._look_again(trainer)
        if not self._steps:  # only now has Lightning counted the batch in which a checkpoint was written
            now = trainer.fit_loop.epoch_loop._batches_that_stepped
            self._intervals = now // (self._every(trainer) or 1)
            for reader in self._readers:
                reader.begin(now)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of a log interval, read the device in one copy and write the scalars to every logger."""
        self._look_again(trainer)
        if trainer.global_step == self._last_step:  # gradient accumulation: no step yet
            return
        self._last_step = trainer.global_step
        self._steps += 1
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the axis of the Trainer's own metrics
        self._batches = step + 1
        logs = self._log_is_due(trainer)
        if not logs and self._steps < self._next_look:
            return
        if logs:
            self._log(trainer, step)
        else:
            for reader in self._readers:
                reader.look()
        self._look_at_skips(trainer, logs)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log a summary of the run in one sentence."""
        self._conclude(trainer)

    def _conclude(self, trainer: pl.Trainer) -> None:
        """Draw the last picture and log a summary of the run in one sentence. This takes no collective."""
        for reader in self._readers if self._steps and self._every(trainer) else ():
            if trainer.is_global_zero:
                reader.draw_in(trainer.loggers, self._batches)
            if sentence := reader.sentence(self._batches):
                rank_zero_info(f"AdaptiveMemory, {sentence}")

    def _log(self, trainer: pl.Trainer, step: int) -> None:
        """Read on all ranks, so that their state in a checkpoint is the same, and write on rank 0.

        Args:
            step: step on the loggers' axis, which begins at 0.
        """
        total = _batches_of(trainer, self._batches)
        for reader in self._readers:
            reader.read(self._batches)
            if trainer.is_global_zero:
                reader.log(trainer.loggers, step, type(trainer.strategy).__name__, total)

    def _every(self, trainer: pl.Trainer) -> int:
        return int(self.log_every_n_steps or trainer.log_every_n_steps)  # type: ignore[union-attr]

    def _log_is_due(self, trainer: pl.Trainer) -> bool:
        """Return whether a log interval has ended, which may have happened in a batch that made no step."""
        every = self._every(trainer)
        if not every:
            return False
        before, self._intervals = self._intervals, self._batches // every
        return self._intervals > before or trainer.should_stop

    def _look_at_skips(self, trainer: pl.Trainer, logs: bool) -> None:
        for reader in self._readers:
            if logs and reader.newly_skipped():
                rank_zero_warn(reader.skip_warning())
            if reader.skipped_in_a_row >= self.max_consecutive_skips:
                self._give_up(trainer, reader)
        in_a_row = max((reader.skipped_in_a_row for reader in self._readers), default=0)
        self._next_look = self._steps + self.max_consecutive_skips - in_a_row  # the earliest step that can reach it

    def _give_up(self, trainer: pl.Trainer, reader: StatsLogger) -> None:
        """Save the last good weights and raise, on all ranks at once because their counts are the same."""
        checkpoint = trainer.checkpoint_callback
        folder = getattr(checkpoint, "dirpath", None) or trainer.default_root_dir
        path = os.path.join(folder, f"am-nonfinite-step={trainer.global_step}.ckpt")
        trainer.save_checkpoint(path)
        raise SkippedStepsError(
            f"{reader.skipped_in_a_row} steps in a row were dropped because a sum over gradients was not finite; "
            f"the first bad parameter is {reader.first_bad!r}. The weights are those of the last good step, saved in "
            f"{path}. Look at that layer's inputs and loss terms, lower the learning rate or clip gradients, and "
            f"resume; max_consecutive_skips is {self.max_consecutive_skips}."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return each optimizer's skipped steps and current interval, so that curves have no gap after a resume."""
        if not self._readers:
            return self._at_end or {"skipped_steps": []}
        skipped = [reader.skipped_in_all() for reader in self._readers]
        return {"skipped_steps": skipped, "readers": [reader.state_dict() for reader in self._readers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned. FSDP and model parallel call it after on_fit_start, others before."""
        self._saved = dict(state_dict)
        self._count_from_checkpoint()

    def _count_from_checkpoint(self) -> None:
        for reader, skipped in zip(self._readers, self._saved.get("skipped_steps", []), strict=False):
            reader.skipped_before += skipped - reader.skipped_in_all()
        for reader, saved in zip(self._readers, self._saved.get("readers", []), strict=False):
            reader.load_state_dict(saved)
        if self._readers:
            self._saved = {}


def _batches_of(trainer: pl.Trainer, batches: int) -> int | None:
    """Return the fit's number of batches that make a step, or None if it is unlimited or unknown.

    Args:
        batches: their number so far, at least 1. If several optimizers step in a batch, each step counts in
            ``max_steps``.
    """
    if trainer.max_steps > 0:
        return int(trainer.max_steps * batches // trainer.global_step)
    try:
        found = trainer.estimated_stepping_batches
    except MisconfigurationException:  # the accumulation changes during the fit
        return None
    return int(found) if 0 < found < math.inf else None
