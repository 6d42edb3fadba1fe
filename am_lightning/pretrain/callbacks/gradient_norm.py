"""The global gradient norm before clipping, under Lightning's strategies."""

from __future__ import annotations

from collections import defaultdict

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from am_lightning.optim.base import AdaptiveMemoryOptimizer
from am_lightning.optim.gradient_clipping import clip_grad_norm_
from am_lightning.optim.unwrap import unwrap_optimizer


@torch.no_grad()
def gradient_norm(trainer: L.Trainer, optimizer: Optimizer) -> Tensor | None:
    """Return the 2-norm over all parameters of the model, a 0-dim tensor on the device. Call it on every rank.

    Returns:
        None if something else computes the norm: DeepSpeed's engine, or AdaptiveMemory's clipping, which logs
        `am/grad_norm`.
    """
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return None
    inner = unwrap_optimizer(optimizer)
    if isinstance(inner, AdaptiveMemoryOptimizer):
        clips = bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm != "value"
        return None if clips else clip_grad_norm_(inner, float("inf"))
    alike: dict[object, list[Tensor]] = defaultdict(list)  # one norm cannot mix meshes and placements
    for grad in (p.grad for group in inner.param_groups for p in group["params"] if p.grad is not None):
        alike[(grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None].append(grad)
    squares = torch.zeros((), device="cpu")
    for grads in alike.values():
        norm = torch.nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        squares = squares.to(norm.device) + norm.float().square()
    model = trainer.strategy.model
    if isinstance(model, FullyShardedDataParallel) and model.sharding_strategy != ShardingStrategy.NO_SHARD:
        torch.distributed.all_reduce(squares, group=model.process_group)  # each rank has a shard of each flat gradient
    return squares.sqrt()
