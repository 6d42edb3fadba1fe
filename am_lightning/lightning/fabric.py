"""Tell an optimizer where its parameters are under Lightning Fabric, and log its momentum."""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from am_lightning.distributed.strategies.fsdp1 import is_managed, managed_parameters
from am_lightning.lightning.compat import Fabric, FabricDDPStrategy, FabricDeepSpeedStrategy
from am_lightning.lightning.loggers import StatsLogger
from am_lightning.loggers.step_logger import StepHook, StepLogger, free_prefix, loggers_of
from am_lightning.optim.base import AdaptiveMemoryOptimizer
from am_lightning.optim.unwrap import bind_distributed, require_am_optimizer
from am_lightning.optim.validation import check_count


def attach(fabric: Fabric, model: nn.Module, optimizer: Any, *, log_every_n_steps: int | None = 50) -> StatsLogger:
    """Tell ``optimizer`` where its parameters are, and log its momentum to the loggers of ``fabric``.

    Call it on every process, after ``fabric.setup(...)`` and before the first step. Parameters get the model's names
    (names given by the user stay), FSDP1's process groups become known, and under DDP ``replica_group`` is set if it is
    None. Calling it again for the same optimizer changes the model and the interval only.

    Args:
        fabric: the Fabric that set up the model and the optimizer.
        model: the module that ``fabric.setup`` returned.
        optimizer: an AMAdamW or AMSGD, or the wrapper that ``fabric.setup`` returned for it.
        log_every_n_steps: log interval in optimizer steps. Global rank zero logs the values that the AdaptiveMemory
            callback logs, and warns of dropped steps. None: nothing is logged. Default: 50.

    Returns:
        The reader. For your own logging, call ``reader.read()``, then ``reader.scalars()``, which covers the steps
        since the previous read. After training, ``reader.finish()`` draws the last picture and returns a summary of the
        run in one sentence. If ``fabric.save`` is given the reader (``"am": reader``), curves have no gap after a
        resume.

    Raises:
        TypeError: if an argument is of the wrong type, such as a torch.optim.AdamW.
        ValueError: if ``log_every_n_steps`` is below 1, the model does not have the optimizer's parameters, its
            DeepSpeed engine steps another optimizer, or FSDP1's process groups are not known from it.
        RuntimeError: if the strategy is DDP and ``fabric.launch()`` has not been called.
    """
    if not isinstance(fabric, Fabric):
        raise TypeError(f"Invalid fabric: {type(fabric).__name__} (must be a Fabric of lightning or lightning_fabric)")
    if not isinstance(model, nn.Module):
        raise TypeError(f"Invalid model: {type(model).__name__} (must be the module that fabric.setup returned)")
    am_optimizer = require_am_optimizer(
        optimizer,
        "build am_lightning.am_adamw(model, lr=...), or AMAdamW(model.named_parameters(), lr=...), in place of it "
        "before fabric.setup",
    )
    if log_every_n_steps is not None:
        check_count("log_every_n_steps", log_every_n_steps)
    after_each_step = None
    if isinstance(fabric.strategy, FabricDeepSpeedStrategy):
        from am_lightning.deepspeed import engine as deepspeed_engine

        engine = getattr(model, "_forward_module", model)  # Fabric wraps the engine
        own = deepspeed_engine.attach(engine)
        if own is not am_optimizer:
            raise ValueError(
                f"the DeepSpeed engine in this model steps another {type(own).__name__}, and this "
                f"{type(am_optimizer).__name__} never steps: give attach what one fabric.setup(model, "
                "optimizer) returned"
            )
        after_each_step = partial(deepspeed_engine.after_each_step, engine)
    else:
        _check_model(model, am_optimizer)
        bind_distributed(am_optimizer, model, replicated=_is_replicated(fabric, am_optimizer))
    loggers = (logger for logger in loggers_of(am_optimizer) if isinstance(logger, _FabricLogger))
    logger = next((logger for logger in loggers if logger.fabric is fabric), None)
    if logger is None:
        logger = _FabricLogger(fabric, am_optimizer, after_each_step)
    logger.every = log_every_n_steps
    return logger.reader


def _check_model(model: nn.Module, optimizer: AdaptiveMemoryOptimizer) -> None:
    """Raise a ValueError if the model has none of the parameters, or is not the module that FSDP1 wrapped."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    held = {id(param) for param in model.parameters()}
    if not any(id(param) in held for param in params):
        raise ValueError(
            f"the model has none of the {len(params)} parameters of this {type(optimizer).__name__}: give attach the "
            "model and the optimizer of one fabric.setup(model, optimizer); under ModelParallelStrategy build the "
            "optimizer from what fabric.setup_module(model) returned"
        )
    known = managed_parameters(model)
    if any(is_managed(param) and id(param) not in known for param in params):
        raise ValueError(
            "FSDP1's process groups are not known from this model: give attach the module that fabric.setup returned, "
            "not the one that it was given"
        )


def _is_replicated(fabric: Fabric, optimizer: AdaptiveMemoryOptimizer) -> bool:
    """Return whether the strategy is DDP over several processes.

    Raises:
        RuntimeError: if the processes are not connected yet.
    """
    if not isinstance(fabric.strategy, FabricDDPStrategy) or fabric.world_size == 1:
        return False
    if optimizer.replica_group is None and not torch.distributed.is_initialized():
        raise RuntimeError(
            f"{fabric.world_size} processes are not connected yet: call fabric.launch() and fabric.setup(model, "
            "optimizer) first, then attach"
        )
    return True


class _FabricLogger(StepLogger):
    """Write to the loggers of ``fabric``."""

    reader: StatsLogger
    stacklevel = 7  # Fabric's optimizer is around ours

    def __init__(self, fabric: Fabric, optimizer: AdaptiveMemoryOptimizer, after_each_step: StepHook | None) -> None:
        self.fabric = fabric
        others = _LOGGERS.setdefault(fabric, WeakSet())
        reader = StatsLogger(optimizer, free_prefix(others), per_layer=True, histogram=True)
        others.add(self)
        super().__init__(reader, after_each_step)

    def is_main(self) -> bool:
        return bool(self.fabric.is_global_zero)

    def write(self) -> None:
        self.reader.log(self.fabric.loggers, self.steps, type(self.fabric.strategy).__name__)

    def draw(self) -> None:
        self.reader.draw_in(self.fabric.loggers, self.steps)


_LOGGERS: WeakKeyDictionary[Fabric, WeakSet[_FabricLogger]] = WeakKeyDictionary()  # attached ones
