"""Lightning Fabric: ``attach`` tells an optimizer where its parameters are, and logs its momentum."""

from __future__ import annotations

import itertools
import warnings
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from am_lightning.distributed.strategies.dtensor import is_dtensor
from am_lightning.distributed.strategies.fsdp1 import is_managed, managed_parameters
from am_lightning.lightning.compat import Fabric, FabricDDPStrategy, FabricDeepSpeedStrategy
from am_lightning.lightning.loggers import Curves
from am_lightning.loggers.reader import prefix_of
from am_lightning.loggers.step_logger import StepHook, StepLog
from am_lightning.optim.base import AdaptiveMemoryOptimizer
from am_lightning.optim.unwrap import adaptive
from am_lightning.optim.validation import check_count


def attach(fabric: Fabric, model: nn.Module, optimizer: Any, *, log_every_n_steps: int | None = 50) -> Curves:
    """Tell ``optimizer`` where its parameters are, and log its momentum to the loggers of ``fabric``.

    Call it on every process, after ``fabric.setup(...)`` and before the first step. Parameters get the model's names
    (names given by the user stay), FSDP1's process groups become known, and under DDP ``replica_group`` is set where it
    is None. Calling it again for the same optimizer changes the model and the interval only.

    Args:
        fabric: that set up the model and the optimizer.
        model: what ``fabric.setup`` returned.
        optimizer: AMAdamW or AMSGD, or what ``fabric.setup`` made of it.
        log_every_n_steps: every so many optimizer steps global rank zero logs what the AdaptiveMemory callback does, at
            the number of optimizer steps, and warns of dropped steps. None: it does not.

    Returns:
        The curves, for logging of one's own: ``curves.read()``, then ``curves.scalars()``.

    Raises:
        TypeError: an argument is of the wrong type, such as a torch.optim.AdamW; the text has the cure.
        ValueError: ``log_every_n_steps`` is below 1, the model does not have the optimizer's parameters, its DeepSpeed
            engine steps another optimizer, or FSDP1's process groups are not known from it.
        RuntimeError: DDP before ``fabric.launch()``.
    """
    if not isinstance(fabric, Fabric):
        raise TypeError(f"Invalid fabric: {type(fabric).__name__} (must be a Fabric of lightning or lightning_fabric)")
    if not isinstance(model, nn.Module):
        raise TypeError(f"Invalid model: {type(model).__name__} (must be the module that fabric.setup returned)")
    ours = adaptive(
        optimizer,
        "build am_lightning.am_adamw(model, lr=...), or AMAdamW(model.named_parameters(), lr=...), in place of it "
        "before fabric.setup",
    )
    if log_every_n_steps is not None:
        check_count("log_every_n_steps", log_every_n_steps)
    after_each_step = None
    if isinstance(fabric.strategy, FabricDeepSpeedStrategy):
        from am_lightning.deepspeed import engine as deepspeed_engine

        engine = getattr(model, "_forward_module", model)  # what Fabric's wrapper holds
        own = deepspeed_engine.attach(engine)
        if own is not ours:
            raise ValueError(
                f"the DeepSpeed engine in this model steps another {type(own).__name__}, and this "
                f"{type(ours).__name__} never steps: give attach what one fabric.setup(model, optimizer) returned"
            )
        after_each_step = partial(deepspeed_engine.after_each_step, engine)
    else:
        _check_model(model, ours)
        ours.bind_model(model)
        _set_replicas(fabric, ours)
    log = _log_of(fabric, ours) or _StepLog(fabric, ours, after_each_step)
    log.every = log_every_n_steps
    return log.curves


def _check_model(model: nn.Module, optimizer: AdaptiveMemoryOptimizer) -> None:
    """Refuse a model that does not hold the parameters, or is not the one that FSDP1 wrapped."""
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


def _set_replicas(fabric: Fabric, optimizer: AdaptiveMemoryOptimizer) -> None:
    if (
        not isinstance(fabric.strategy, FabricDDPStrategy)
        or fabric.world_size == 1
        or optimizer.replica_group is not None
    ):
        return
    if not torch.distributed.is_initialized():
        raise RuntimeError(
            f"{fabric.world_size} processes are not connected yet: call fabric.launch() and fabric.setup(model, "
            "optimizer) first, then attach"
        )
    if not any(is_dtensor(param) for group in optimizer.param_groups for param in group["params"]):
        optimizer.replica_group = torch.distributed.group.WORLD


class _StepLog(StepLog):
    """To the loggers of ``fabric``."""

    def __init__(self, fabric: Fabric, optimizer: AdaptiveMemoryOptimizer, after_each_step: StepHook | None) -> None:
        self.fabric = fabric
        others = _LOGS.setdefault(fabric, WeakSet())
        self.curves = Curves(optimizer, _free_prefix(others), per_layer=True, histogram=True)
        self.curves.read()  # its tags are known from now on
        others.add(self)
        super().__init__(self.curves, after_each_step)

    def is_main(self) -> bool:
        return bool(self.fabric.is_global_zero)

    def log(self) -> None:
        curves, loggers = self.curves, self.fabric.loggers
        curves.read()
        if curves.newly_skipped():
            warnings.warn(curves.skip_warning(), stacklevel=7)  # whoever calls step() of Fabric's optimizer
        curves.log(loggers, self.steps)
        all_curves = sorted((log.curves for log in _LOGS[self.fabric]), key=lambda other: other.prefix)
        Curves.arrange(all_curves, loggers, self.fabric.strategy)


_LOGS: WeakKeyDictionary[Fabric, WeakSet[_StepLog]] = WeakKeyDictionary()  # those attached, for their tags


def _free_prefix(others: WeakSet[_StepLog]) -> str:
    taken = {log.curves.prefix for log in others}
    return next(name for name in map(prefix_of, itertools.count()) if name not in taken)


def _log_of(fabric: Fabric, optimizer: Any) -> _StepLog | None:
    return next((log for log in _LOGS.get(fabric, ()) if log.curves.optimizer is optimizer), None)
