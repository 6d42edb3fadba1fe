"""Where a logical tensor lives, and the one reduction that sums over its pieces."""

from am_lightning.sharding.dtensor import settled_gradient
from am_lightning.sharding.home import Row
from am_lightning.sharding.layout import Layout, gradient_of, lay_out_rows, piece_of

__all__ = ["Layout", "Row", "gradient_of", "lay_out_rows", "piece_of", "settled_gradient"]
