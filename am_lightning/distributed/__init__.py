"""Find the ranks that hold a logical tensor, and sum over its shards in one reduction."""

from am_lightning.distributed.layout import ShardLayout
from am_lightning.distributed.logical_param import local_grad, local_shard, logical_params_of
from am_lightning.distributed.strategies import LogicalParam, redistributed_grad

__all__ = ["LogicalParam", "ShardLayout", "local_grad", "local_shard", "logical_params_of", "redistributed_grad"]
