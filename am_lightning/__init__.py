"""Adaptive memory momentum for PyTorch, Lightning and Accelerate: beta_t is computed at every step, not fixed."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from am_lightning.lightning import AdaptiveMemory
    from am_lightning.optim import AMSGD, AMAdamW, clip_grad_norm_
    from am_lightning.optim.param_groups import am_adamw, am_sgd

__version__ = "0.1.0"

__all__ = ["AMSGD", "AMAdamW", "AdaptiveMemory", "am_adamw", "am_sgd", "clip_grad_norm_"]

# Imported on first use, so that the console command starts without torch, and the optimizers need no Lightning.
_HOMES = {
    "AMSGD": "am_lightning.optim",
    "AMAdamW": "am_lightning.optim",
    "AdaptiveMemory": "am_lightning.lightning",
    "am_adamw": "am_lightning.optim.param_groups",
    "am_sgd": "am_lightning.optim.param_groups",
    "clip_grad_norm_": "am_lightning.optim",
}
_PACKAGES = ("deepspeed", "distributed", "huggingface", "lightning", "loggers", "optim")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"am_lightning.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    if name == "AdaptiveMemory":
        from am_lightning.lightning.compat import join

        join()  # LightningCLI looks the class up here by name, and then checks that it is a Callback
    else:
        globals()[name] = value
    return value


if "torch" in sys.modules:  # then it costs nothing, and LightningCLI finds imported classes by their bare names
    importlib.import_module("am_lightning.optim")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "distributed", "optim"})
