"""Lightning: the AdaptiveMemory callback turns a module's AdamW into AMAdamW and shows its momentum; Fabric: attach."""

from am_lightning.lightning.callback import AdaptiveMemory
from am_lightning.lightning.fabric import attach

__all__ = ["AdaptiveMemory", "attach"]
