"""Where a logical tensor lives, and the one reduction that sums over its pieces."""

from am_lightning.distributed.layout import Layout, gradient_of, lay_out_rows, piece_of
from am_lightning.distributed.shard import Row
from am_lightning.distributed.strategies.dtensor import settled_gradient

__all__ = ["Layout", "Row", "gradient_of", "lay_out_rows", "piece_of", "settled_gradient"]
