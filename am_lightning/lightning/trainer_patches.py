"""Patches that AdaptiveMemory applies to a Trainer's strategy, precision plugin and callbacks during a fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.optim.optimizer import Optimizer

import am_lightning.lightning.compat as pl
from am_lightning.lightning.compat import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPPrecision,
    FSDPStrategy,
    MisconfigurationException,
    ModelParallelStrategy,
    Precision,
    loaded,
)
from am_lightning.lightning.patched_methods import PatchedMethods
from am_lightning.loggers.reader import read_report
from am_lightning.optim.base import AdaptiveMemoryOptimizer
from am_lightning.optim.gradient_clipping import clip_grad_norm_
from am_lightning.optim.param_state import SCALARS
from am_lightning.optim.unwrap import am_optimizers, bind_distributed, unwrap_optimizer


def patch_trainer(trainer: pl.Trainer, patches: PatchedMethods) -> None:
    """Make the trainer clip by ``clip_grad_norm_`` and load distributed checkpoints of AdamW until ``undo``."""
    plugin, strategy = trainer.precision_plugin, trainer.strategy
    lightnings_own = [kind.clip_grad_by_norm for kind in (*loaded(Precision), *loaded(FSDPPrecision))]
    if type(plugin).clip_grad_by_norm in lightnings_own and "clip_grad_by_norm" not in plugin.__dict__:
        patches.add(plugin, "clip_grad_by_norm", _clip_by_norm)
    if isinstance(strategy, ModelParallelStrategy):
        patches.add(strategy, "load_checkpoint", partial(_load_checkpoint, strategy))
    for callback in trainer.callbacks:  # type: ignore[union-attr]
        if getattr(callback, "log_momentum", False) and hasattr(callback, "_extract_momentum"):  # LearningRateMonitor
            patches.add(callback, "_extract_momentum", partial(_show_momentum, trainer, callback, {}))


def _clip_by_norm(original: Callable[..., None], optimizer: Optimizer, clip_val: float) -> None:
    """Replace ``clip_grad_by_norm`` of a precision plugin. Lightning's raises under FSDP1, torch's under FSDP2 with TP.

    All clipping in Lightning calls it: gradient_clip_val, a module's own configure_gradient_clipping, and
    ``self.clip_gradients`` in manual optimization.
    """
    inner = unwrap_optimizer(optimizer)
    if isinstance(inner, AdaptiveMemoryOptimizer):
        clip_grad_norm_(inner, clip_val)
    else:
        original(optimizer, clip_val)


def _show_momentum(
    trainer: pl.Trainer,
    monitor: Any,
    read: dict[int, torch.Tensor],
    original: Callable[..., dict[str, float]],
    param_group: dict[str, Any],
    **more: Any,
) -> dict[str, float]:
    """Return the mean beta_t of the group's tensors as LearningRateMonitor's ``...-momentum``.

    Nothing is returned before the first step. The monitor itself would show ``betas[0]`` (SGD: "momentum"), which is
    the cap, or a number that OneCycleLR sets and the optimizer does not use. It asks for the groups of an optimizer in
    their order, so the device is read at the first group and ``read`` keeps the values for the others.
    """
    shown = original(param_group, **more)
    for index, optimizer in enumerate(am_optimizers(trainer.optimizers)):
        if not any(group is param_group for group in optimizer.param_groups):
            continue
        if index not in read or param_group is optimizer.param_groups[0]:
            read[index], _ = read_report(optimizer)
        betas = read[index]
        own = [row for row, group in enumerate(optimizer.groups_of_parameters()) if group is param_group]
        beta = float(betas[own].nanmean())
        shown = {} if math.isnan(beta) else dict.fromkeys(shown, beta)
        monitor.last_momentum_values.update(shown)
    return shown


def _load_checkpoint(
    strategy: ModelParallelStrategy,
    original: Callable[..., dict[str, Any]],
    checkpoint_path: Any,
    *args: Any,
    **kw: Any,
) -> dict[str, Any]:
    """Replace ``load_checkpoint`` of ModelParallelStrategy, to also accept a distributed checkpoint of AdamW.

    torch.distributed.checkpoint loads the keys of ``state_dict()``, and raises if the checkpoint lacks one of them.
    """
    path = Path(strategy.broadcast(checkpoint_path))
    with ExitStack() as stack:
        if (path / ".metadata").is_file():
            saved = set(FileSystemReader(path).read_metadata().state_dict_metadata)
            for index, optimizer in enumerate(strategy.optimizers):
                if isinstance(optimizer, AdaptiveMemoryOptimizer):
                    stack.enter_context(_showing_only(optimizer, saved, f"optimizer_{index}."))
        return original(path, *args, **kw)


@contextmanager
def _showing_only(optimizer: AdaptiveMemoryOptimizer, saved: set[str], prefix: str) -> Iterator[None]:
    """Make ``state_dict()`` leave out options and adaptive scalars that ``saved`` lacks. Loading fills them in."""
    states = [key for key in saved if key.startswith(f"{prefix}state.")]
    if any(key.endswith(".max_exp_avg_sq") for key in states):
        raise ValueError("the checkpoint has AdamW with amsgrad=True, which AMAdamW does not support: start again")
    missing = {scalar for scalar in SCALARS if not any(key.endswith(f".{scalar}") for key in states)}

    def only(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {
            "state": {
                index: {key: value for key, value in state.items() if key not in missing}
                for index, state in state_dict["state"].items()
            },
            "param_groups": [
                {key: v for key, v in group.items() if key == "params" or f"{prefix}param_groups.{g}.{key}" in saved}
                for g, group in enumerate(state_dict["param_groups"])
            ],
        }

    handle = optimizer.register_state_dict_post_hook(only)
    try:
        yield
    finally:
        handle.remove()


def bind_module(optimizer: AdaptiveMemoryOptimizer, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Call ``bind_distributed`` with the module that the strategy trains."""
    strategy = trainer.strategy
    model = strategy.model if isinstance(strategy, FSDPStrategy) else pl_module
    assert model is not None
    ddp = isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)  # a subclass of DDPStrategy
    bind_distributed(optimizer, model, replicated=ddp and trainer.world_size > 1)


def allow_in_deepspeed(strategy: DeepSpeedStrategy) -> None:
    """Set the DeepSpeed options that allow an optimizer of another package.

    Raises:
        MisconfigurationException: if the configuration names an optimizer, which DeepSpeed would build instead.
    """
    config = strategy.config
    assert isinstance(config, dict)
    if "optimizer" in config:
        raise MisconfigurationException(
            f"the DeepSpeed configuration names an optimizer ({config['optimizer'].get('type')!r}), which adaptive "
            "memory cannot turn into its own: remove 'optimizer' from it, and return torch.optim.AdamW or AMAdamW from "
            "configure_optimizers"
        )
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)


def check_of_engine(strategy: DeepSpeedStrategy, optimizers: list[Any]) -> None:
    """Check that the optimizers given in mid-run are the one that DeepSpeed's engine steps.

    Raises:
        MisconfigurationException: if there is another one, which would never step and whose curves would not change.
    """
    own = unwrap_optimizer(strategy.model.optimizer)  # type: ignore[union-attr]
    if [unwrap_optimizer(optimizer) for optimizer in optimizers] != [own]:
        given = ", ".join(type(unwrap_optimizer(optimizer)).__name__ for optimizer in optimizers) or "no optimizer"
        raise MisconfigurationException(
            f"the Trainer was given {given} in mid-run, but DeepSpeed's engine continues with the {type(own).__name__} "
            "that it was built around: another optimizer would never step. Change the options in the param_groups of "
            "trainer.optimizers[0], or start another fit, which builds another engine"
        )


def unwrapped(optimizers: list[Any]) -> list[Any]:
    """Return the optimizers without LightningOptimizer, which ``module.optimizers()`` adds and which copies AdamW."""
    if not any(map(_is_lightnings, optimizers)):
        return optimizers
    return [o.optimizer if _is_lightnings(o) else o for o in optimizers]


def _is_lightnings(optimizer: Any) -> bool:
    return any(cls.__name__ == "LightningOptimizer" for cls in type(optimizer).__mro__)
