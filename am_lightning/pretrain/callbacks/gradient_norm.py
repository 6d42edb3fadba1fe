"""The global norm of a gradient that nobody has clipped yet, under Lightning's strategies."""

from __future__ import annotations

from collections import defaultdict

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from am_lightning.optim.base import AdaptiveMemoryOptimizer
from am_lightning.optim.gradient_clipping import clip_grad_norm_
from am_lightning.optim.unwrap import unwrap_optimizer


@torch.no_grad()
def gradient_norm(trainer: L.Trainer, optimizer: Optimizer) -> Tensor | None:
    """The 2-norm over all parameters of the model, 0-dim on the device; every process has to call it.

    Returns:
        None where somebody else has it: DeepSpeed's engine, or AdaptiveMemory's clipping, which logs `am/grad_norm`.
    """
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return None
    inner = unwrap_optimizer(optimizer)
    if isinstance(inner, AdaptiveMemoryOptimizer):
        clips = bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm != "value"
        return None if clips else clip_grad_norm_(inner, float("inf"))
    grads = [p.grad for group in inner.param_groups for p in group["params"] if p.grad is not None]
    squares = _local_squares(grads)
    if isinstance(trainer.strategy, FSDPStrategy):
        return _over_shards(squares, trainer.strategy)
    return squares.sqrt()


def _local_squares(grads: list[Tensor]) -> Tensor:
    """Sum of squares. Tensors of one mesh and placement at a time, as one norm cannot mix them."""
    alike: dict[object, list[Tensor]] = defaultdict(list)
    for grad in grads:
        alike[(grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else grad.device].append(grad)
    total = torch.zeros((), device="cpu")
    for group in alike.values():
        norm = torch.nn.utils.get_total_norm(group)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        total = total.to(norm.device) + norm.float().square()
    return total


def _over_shards(squares: Tensor, strategy: FSDPStrategy) -> Tensor:
    """FSDP1: every process has a shard of each flat gradient, but for NO_SHARD."""
    model = strategy.model
    if isinstance(model, FullyShardedDataParallel) and model.sharding_strategy != ShardingStrategy.NO_SHARD:
        torch.distributed.all_reduce(squares, group=model.process_group)
    return squares.sqrt()
