"""The strategy of plain tensors, which are whole on every rank that has them."""

from __future__ import annotations

from torch import Tensor

from am_lightning.distributed.shard import ShardInfo, TensorSlice, my_rank
from am_lightning.distributed.strategies.strategy import Strategy


class UnshardedStrategy(Strategy):
    """One process, or copies (DDP). A tensor does not tell whether other ranks hold copies."""

    name = "no sharding"

    def holds(self, param: Tensor) -> bool:
        return True

    def slices(self, param: Tensor, name: str, group_index: int) -> list[TensorSlice]:
        return [TensorSlice(name, ShardInfo(frozenset([my_rank()]), True, tuple, param.numel(), "plain"))]
