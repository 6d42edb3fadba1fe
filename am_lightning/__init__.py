"""Adaptive memory momentum for PyTorch, Lightning and Accelerate: beta_t is computed at every step, not fixed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from am_lightning.optim import AMSGD, AMAdamW, clip_grad_norm_
from am_lightning.optim.param_groups import am_adamw, am_sgd

if TYPE_CHECKING:
    from am_lightning.lightning import AdaptiveMemory

__version__ = "0.1.0"

__all__ = ["AMSGD", "AMAdamW", "AdaptiveMemory", "am_adamw", "am_sgd", "clip_grad_norm_"]


def __getattr__(name: str) -> Any:
    if name == "AdaptiveMemory":  # imports lightning: on first use only
        from am_lightning.lightning import AdaptiveMemory
        from am_lightning.lightning.compat import join

        join()  # LightningCLI looks it up here when its own name is loaded, and asks whether it is a Callback
        return AdaptiveMemory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
