"""Hugging Face: ``attach`` for Accelerate; AdaptiveMemoryCallback and AMAdamWFactory for transformers' Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from am_lightning.huggingface.accelerate import attach

if TYPE_CHECKING:
    from am_lightning.huggingface.trainer import AdaptiveMemoryCallback, AMAdamWFactory

__all__ = ["AMAdamWFactory", "AdaptiveMemoryCallback", "attach"]


def __getattr__(name: str) -> Any:
    if name in ("AdaptiveMemoryCallback", "AMAdamWFactory"):  # imports transformers, on first use only
        from am_lightning.huggingface import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
