"""DeepSpeed: ``attach(engine)`` tells the optimizer what only the engine knows."""

from am_lightning.deepspeed.engine import after_each_step, attach

__all__ = ["after_each_step", "attach"]
