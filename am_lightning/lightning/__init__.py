"""Use adaptive memory in Lightning: the AdaptiveMemory callback for the Trainer, and ``attach`` for Fabric."""

from am_lightning.lightning.callback import AdaptiveMemory
from am_lightning.lightning.fabric import attach

__all__ = ["AdaptiveMemory", "attach"]
