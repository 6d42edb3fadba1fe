"""DeepSpeed: ``attach(engine)`` gives the optimizer the information that only the engine has."""

from am_lightning.deepspeed.engine import after_each_step, attach

__all__ = ["after_each_step", "attach"]
