"""Functions that each rank runs: a strategy that the package does not have, entered in its table."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from am_lightning import AMAdamW
from am_lightning.distributed import strategies
from am_lightning.distributed.shard import ShardInfo, TensorSlice
from am_lightning.distributed.strategies import LogicalParam, Strategy

DTYPE = torch.float64
SIZES = (5, 3)  # sizes of two tensors in one parameter, split over the ranks


class Cut(Strategy):
    """Two tensors in one vector. Each of n ranks holds every n-th element of both tensors."""

    name = "cut"
    one_state_dtype = True

    def holds(self, param: Tensor) -> bool:
        return hasattr(param, "cut")

    def slices(self, param: Tensor, name: str, group_index: int) -> list[TensorSlice]:
        ranks = frozenset(range(dist.get_world_size()))
        found, start = [], 0
        for part, size in enumerate(SIZES):
            shard = ShardInfo(ranks, True, lambda: (dist.group.WORLD,), size, "cut in parts")
            held = len(range(dist.get_rank(), size, dist.get_world_size()))
            found.append(TensorSlice(f"{name}.{part}", shard, slice(start, start + held)))
            start += held
        return found

    @classmethod
    def check_demand(cls, params: Any, demand: Any) -> None:
        if demand.scope == "tensor" and any(param.param.numel() > 8 for param in params):
            raise ValueError("cut in too many parts")


def of_this_rank(whole: list[Tensor]) -> Tensor:
    return torch.cat([tensor[dist.get_rank() :: dist.get_world_size()] for tensor in whole])


def compare(scope: str) -> dict[str, Any]:
    """Return the largest difference from one process with both tensors whole, and the strategy's description."""
    generator = torch.Generator().manual_seed(0)
    draw = [[torch.randn(size, generator=generator, dtype=DTYPE) for size in SIZES] for _ in range(6)]
    whole = [nn.Parameter(tensor.clone()) for tensor in draw[0]]
    flat = nn.Parameter(of_this_rank(draw[0]))
    flat.cut = True  # type: ignore[attr-defined]
    single = AMAdamW(zip(["w.0", "w.1"], whole, strict=True), lr=0.1, scope=scope)
    with patch.object(strategies, "STRATEGIES", (Cut, *strategies.STRATEGIES)):
        many = AMAdamW([("w", flat)], lr=0.1, scope=scope)
        for grads in draw[1:]:
            flat.grad = of_this_rank(grads)
            for param, grad in zip(whole, grads, strict=True):
                param.grad = grad.clone()
            many.step()
            single.step()
        logical: list[LogicalParam] = many.param_layout.logical_params(many.param_groups)
    betas = [float(single.momentum()[name] - many.momentum()[name]) for name in ("w.0", "w.1")]
    return {
        "weights": float((flat - of_this_rank(whole)).detach().abs().max()),
        "betas": max(map(abs, betas)),
        "described": many.describe(),
        "one_state_dtype": [one.strategy.one_state_dtype for one in logical],
    }


def refused() -> str:
    flat = nn.Parameter(torch.ones(9))
    flat.cut = True  # type: ignore[attr-defined]
    with patch.object(strategies, "STRATEGIES", (Cut, *strategies.STRATEGIES)):
        optimizer = AMAdamW([("w", flat)], scope="tensor")
        flat.grad = torch.ones(9)
        try:
            optimizer.step()
        except ValueError as error:
            return str(error)
    return ""
