"""Where a logical tensor lives, and the one reduction that sums over its pieces."""

from am_lightning.distributed.layout import ShardLayout, local_grad, local_shard, logical_params_of
from am_lightning.distributed.shard import LogicalParam
from am_lightning.distributed.strategies.dtensor import redistributed_grad

__all__ = ["ShardLayout", "LogicalParam", "local_grad", "logical_params_of", "local_shard", "redistributed_grad"]
