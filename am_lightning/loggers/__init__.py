"""Read beta_t as scalars, curves of layers, a histogram and a heat map; ``attach`` logs it from a plain loop."""

from am_lightning.loggers.attach import Log, attach
from am_lightning.loggers.reader import StatsReader

__all__ = ["Log", "StatsReader", "attach"]
