"""Where a logical tensor lives, and the one reduction that sums over its pieces."""

from am_lightning.sharding.layout import Layout, Row

__all__ = ["Layout", "Row"]
