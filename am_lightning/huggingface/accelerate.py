"""Accelerate: ``attach`` binds the optimizer to the layout of its parameters and logs its momentum."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from am_lightning.huggingface.images import track_image
from am_lightning.loggers.custom_scalars import add_momentum
from am_lightning.loggers.reader import StatsReader
from am_lightning.loggers.step_logger import StepHook, StepLogger, free_prefix, loggers_of
from am_lightning.optim.base import AdaptiveMemoryOptimizer
from am_lightning.optim.unwrap import am_optimizers, bind_distributed, require_am_optimizer, unwrap_optimizer
from am_lightning.optim.validation import check_count
from am_lightning.optional_imports import cause_of

try:
    from accelerate import Accelerator, DistributedType
except ImportError as error:
    raise ImportError(
        "am_lightning.huggingface needs accelerate: pip install 'am-lightning[accelerate]', "
        "or '.[accelerate]' in a checkout"
    ) from cause_of(error, "accelerate")


def attach(accelerator: Accelerator, optimizer: Any, *, log_every_n_steps: int | None = 50) -> StatsReader:
    """Bind ``optimizer`` to the layout of its parameters, and log its momentum to the accelerator's trackers.

    Call it on every process, after ``accelerator.prepare(...)`` and before the first step. It gives the parameters the
    names of the prepared model (names given by the user stay) and FSDP1's process groups, and sets ``replica_group``
    under DDP if it is None. A second call for the same optimizer changes the interval only.

    Args:
        accelerator: accelerator that prepared the model and the optimizer.
        optimizer: AMAdamW or AMSGD, or the result of ``prepare``.
        log_every_n_steps: interval in optimizer steps at which the main process logs ``am/beta/mean|min|max``,
            ``am/beta/<layer group>``, ``am/clamp/at_max|at_zero``, ``am/skipped_steps`` and, after
            ``clip_grad_norm_``, ``am/grad_norm``. TensorBoard also gets the histogram ``am/beta``, and trackers of
            pictures get ``am/beta/layers``, at growing intervals. Dropped steps raise a warning. Tags of a second
            optimizer start with ``am-1``. None: nothing is logged.

    Returns:
        The reader. To log elsewhere, call ``reader.read()`` and then ``reader.scalars()``, which cover the steps since
        the previous read. ``print(reader.finish())``, before ``accelerator.end_training()``, draws the last picture and
        prints a summary of the run. After ``accelerator.register_for_checkpointing(reader)`` the curves have no gap
        when a run resumes.

    Raises:
        TypeError: if ``accelerator`` is not an Accelerator, or ``optimizer`` not an adaptive memory optimizer.
        ValueError: if ``log_every_n_steps`` is below 1, no prepared model has the optimizer's parameters, or DeepSpeed
            uses a feature that is not supported.
        RuntimeError: if the optimizer is not prepared.
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"Invalid accelerator: {type(accelerator).__name__} (must be an accelerate.Accelerator)")
    if log_every_n_steps is not None:
        check_count("log_every_n_steps", log_every_n_steps)
    am_optimizer = require_am_optimizer(optimizer, "build AMAdamW(model.named_parameters(), ...) in place of it")
    prepared = [unwrap_optimizer(other) for other in accelerator._optimizers]
    if not any(other is am_optimizer for other in prepared):
        raise RuntimeError(
            f"this {type(am_optimizer).__name__} is not prepared by this accelerator: call model, optimizer = "
            "accelerator.prepare(model, optimizer) first, then attach(accelerator, optimizer)"
        )
    bind_models(am_optimizer, accelerator._models, accelerator.distributed_type, accelerator.num_processes)
    logger = next(iter(_loggers_of(am_optimizer)), None)
    if logger is None:
        others = [other for one in am_optimizers(prepared) for other in _loggers_of(one)]
        logger = _TrackerLogger(StatsReader(am_optimizer, free_prefix(others)), _step_hook(am_optimizer, accelerator))
    logger.accelerator, logger.every = accelerator, log_every_n_steps
    return logger.reader


def engine_of(optimizer: AdaptiveMemoryOptimizer, models: Sequence[Any]) -> Any:
    """Return the DeepSpeedEngine among ``models`` that steps ``optimizer``, or None."""
    return next((model for model in models if unwrap_optimizer(getattr(model, "optimizer", None)) is optimizer), None)


def _step_hook(optimizer: AdaptiveMemoryOptimizer, accelerator: Accelerator) -> StepHook | None:
    """Return the hook of DeepSpeed's engine, which calls ``step()`` several times in a training step, or None."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    from am_lightning.deepspeed.engine import after_each_step

    return partial(after_each_step, engine_of(optimizer, accelerator._models))


def bind_models(
    optimizer: AdaptiveMemoryOptimizer, models: Sequence[nn.Module], distributed_type: DistributedType, processes: int
) -> None:
    """Call ``bind_distributed`` with the models that hold the parameters, or attach DeepSpeed's engine.

    Raises:
        ValueError: if no model holds them, or no DeepSpeed engine steps the optimizer.
    """
    if distributed_type == DistributedType.DEEPSPEED:
        from am_lightning.deepspeed import attach as attach_engine

        engine = engine_of(optimizer, models)
        if engine is None:
            raise ValueError(
                f"no DeepSpeed engine steps this {type(optimizer).__name__}: an engine keeps the optimizer that "
                "it was built with, and one that is given later never steps. Prepare the model and the optimizer "
                "together, in one call"
            )
        attach_engine(engine)
        return
    params = [param for group in optimizer.param_groups for param in group["params"]]
    wanted = {id(param) for param in params}
    found = [(model, wanted & {id(param) for param in model.parameters()}) for model in models]
    holders = [model for model, held in found if held]
    if not holders:
        raise ValueError(
            f"none of the {len(models)} prepared models has any of the {len(params)} parameters of this "
            f"{type(optimizer).__name__}, so its steps would change nothing: prepare the model and the optimizer with "
            "one accelerator, in one call for FSDP2; for FSDP1 with use_orig_params=False prepare the model before the "
            "optimizer is built"
        )
    whole = [model for model, held in found if held == wanted]
    model = whole[0] if whole else nn.ModuleList(holders)
    bind_distributed(optimizer, model, replicated=distributed_type.value.startswith("MULTI_") and processes > 1)


class _TrackerLogger(StepLogger):
    """Logs to the accelerator's trackers."""

    accelerator: Accelerator

    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def write(self) -> None:
        self.accelerator.log(self.reader.scalars(), step=self.steps)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                self.reader.add_histogram(tracker.tracker, self.steps)
                add_momentum(tracker.tracker, self.reader, self.steps)
        if self.reader.history.picture_is_due():
            self.draw()

    def draw(self) -> None:
        self.reader.draw([partial(track_image, tracker) for tracker in self.accelerator.trackers], self.steps)


def _loggers_of(optimizer: Any) -> list[_TrackerLogger]:
    return [logger for logger in loggers_of(optimizer) if isinstance(logger, _TrackerLogger)]
