"""The momentum of an interval as scalars, layers, a histogram and a picture; ``attach`` logs it from a plain loop."""

from am_lightning.loggers.attach import Log, attach
from am_lightning.loggers.reader import StatsReader

__all__ = ["Log", "StatsReader", "attach"]
