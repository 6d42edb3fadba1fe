"""The momentum of an interval as scalars, layers and a histogram; ``attach`` logs it from a plain training loop."""

from am_lightning.loggers.attach import Log, attach

__all__ = ["Log", "attach"]
