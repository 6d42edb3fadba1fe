"""Accelerate: ``attach`` tells the optimizer where its parameters are and logs its momentum."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from am_lightning.distributed.strategies.dtensor import is_dtensor
from am_lightning.loggers.reader import Readings, prefix_of
from am_lightning.loggers.step_logger import StepHook, StepLog, logs_of
from am_lightning.optim.base import AdaptiveMemoryOptimizer
from am_lightning.optim.unwrap import adaptive, innermost
from am_lightning.optim.validation import check_count

try:
    from accelerate import Accelerator, DistributedType
except ImportError as error:
    raise ImportError(
        "am_lightning.huggingface needs accelerate: pip install 'am-lightning[accelerate]', "
        "or '.[accelerate]' in a checkout"
    ) from error


def attach(accelerator: Accelerator, optimizer: Any, *, log_every_n_steps: int | None = 50) -> Readings:
    """Tell ``optimizer`` where its parameters are, and log its momentum to the accelerator's trackers.

    Call it on every process, after ``accelerator.prepare(...)`` and before the first step. Parameters get the names of
    the prepared model (names given by the user stay), FSDP1's process groups become known, and under DDP
    ``replica_group`` is set where it is None. Calling it again for the same optimizer changes the interval only.

    Args:
        accelerator: that prepared the model and the optimizer.
        optimizer: AMAdamW or AMSGD, or what ``prepare`` made of it.
        log_every_n_steps: every so many optimizer steps the main process logs ``am/beta/mean|min|max``,
            ``am/beta/<layer group>``, ``am/clamp/at_max|at_zero``, ``am/skipped_steps`` and, where
            ``clip_grad_norm_`` ran, ``am/grad_norm`` at the number of optimizer steps; the histogram ``am/beta`` to
            TensorBoard. It warns of dropped steps. Tags of a second optimizer start with ``am-1``. None: it does not.

    Returns:
        The readings, for logging of one's own: ``readings.read()``, then ``readings.scalars()``.

    Raises:
        TypeError: not an Accelerator, or not an adaptive memory optimizer.
        ValueError: ``log_every_n_steps`` is below 1, no prepared model has the optimizer's parameters, or a feature of
            DeepSpeed that is not supported.
        RuntimeError: the optimizer is not prepared.
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"Invalid accelerator: {type(accelerator).__name__} (must be an accelerate.Accelerator)")
    if log_every_n_steps is not None:
        check_count("log_every_n_steps", log_every_n_steps)
    ours = adaptive(optimizer, "build AMAdamW(model.named_parameters(), ...) in place of it")
    prepared = [innermost(other) for other in accelerator._optimizers]
    if not any(other is ours for other in prepared):
        raise RuntimeError(
            f"this {type(ours).__name__} is not prepared by this accelerator: call model, optimizer = "
            "accelerator.prepare(model, optimizer) first, then attach(accelerator, optimizer)"
        )
    place(ours, accelerator._models, accelerator.distributed_type, accelerator.num_processes)
    log = _log_of(ours)
    if log is None:
        others = sum(_log_of(other) is not None for other in prepared)
        log = _StepLog(Readings(ours, prefix_of(others)), _step_hook(ours, accelerator))
    log.accelerator, log.every = accelerator, log_every_n_steps
    return log.readings


def engine_of(optimizer: AdaptiveMemoryOptimizer, models: Sequence[Any]) -> Any:
    """The DeepSpeedEngine among ``models`` that steps ``optimizer``, or None."""
    return next((model for model in models if innermost(getattr(model, "optimizer", None)) is optimizer), None)


def _step_hook(optimizer: AdaptiveMemoryOptimizer, accelerator: Accelerator) -> StepHook | None:
    """Under DeepSpeed the engine's: it calls ``step()`` several times in a training step."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    from am_lightning.deepspeed.engine import after_each_step

    return partial(after_each_step, engine_of(optimizer, accelerator._models))


def place(
    optimizer: AdaptiveMemoryOptimizer, models: Sequence[nn.Module], distributed_type: DistributedType, processes: int
) -> None:
    """Give ``optimizer`` the names and the FSDP1 groups of those ``models`` that hold its parameters; DDP's replicas.

    Under DeepSpeed the engine is attached.

    Raises:
        ValueError: none of them does, or no DeepSpeed engine steps it.
    """
    if distributed_type == DistributedType.DEEPSPEED:
        from am_lightning.deepspeed import attach as attach_engine

        engine = engine_of(optimizer, models)
        if engine is None:
            raise ValueError(
                f"no DeepSpeed engine steps this {type(optimizer).__name__}: an engine goes on with the optimizer that "
                "it was built around, and one that is given later never steps. Prepare the model and the optimizer "
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
    optimizer.bind_model(whole[0] if whole else nn.ModuleList(holders))
    replicas = distributed_type.value.startswith("MULTI_") and not any(is_dtensor(param) for param in params)
    if replicas and processes > 1 and optimizer.replica_group is None:
        optimizer.replica_group = torch.distributed.group.WORLD


class _StepLog(StepLog):
    """To the accelerator's trackers."""

    accelerator: Accelerator

    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def log(self) -> None:
        readings, accelerator = self.readings, self.accelerator
        readings.read()
        if readings.newly_skipped():
            warnings.warn(readings.skip_warning(), stacklevel=5)  # whoever calls the prepared step()
        accelerator.log(readings.scalars(), step=self.steps)
        seen = readings.stepped()
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard" and seen.numel():
                tracker.tracker.add_histogram(f"{readings.prefix}/beta", seen, self.steps)


def _log_of(optimizer: Any) -> _StepLog | None:
    return next((log for log in logs_of(optimizer) if isinstance(log, _StepLog)), None)
