"""Functions that ranks run beside the programs of tests/sharding: other placements, and what only NCCL shows."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from am_lightning import AMAdamW, clip_grad_norm_
from am_lightning.distributed.layout import all_reduce
from am_lightning.distributed.strategies.dtensor import local
from tests.device import DEVICE, ON_GPU
from tests.gpu.steps import no_sync
from tests.sharding import steps
from tests.sharding.layouts import LAYOUTS, Placed, everyone, make_net, mesh, shard
from tests.sharding.model import batch_of, groups_of
from tests.sharding.model import make_net as on_cpu

CPU = torch.device("cpu")


def fsdp2_offload(dtype: torch.dtype) -> Placed:
    """Offload FSDP2: weights, gradients and states are on the CPU, the computation is on the GPU."""
    policy = CPUOffloadPolicy(pin_memory=ON_GPU)
    return Placed(shard(make_net(dtype), mesh=mesh(dist.get_world_size()), offload_policy=policy), everyone())


LAYOUTS["fsdp2_offload"] = (fsdp2_offload, (1,))


def compare(*, unseen: bool = False, **arguments: Any) -> dict[str, Any]:
    """Compare with one process on the CPU. ``unseen``: kernels decide, and beta_t before clipping is not collected."""
    dtype = getattr(torch, arguments["dtype"])
    steps.reference(arguments["kind"], arguments["scope"], dtype, "flat" in arguments["layout"])  # is kept
    with pytest.MonkeyPatch.context() as patch:
        if unseen:
            patch.setattr(steps, "raw_betas", lambda scope: nullcontext([]))
        return steps.compare(**arguments)


def reduced_on_the_accelerator() -> dict[str, Any]:
    """Sum float64 of one rank over NCCL, from the GPU and from the CPU of offloaded parameters."""
    vector = torch.arange(5, dtype=torch.float64) / 3
    sums = {where.type: all_reduce(vector.to(where), dist.group.WORLD) for where in (DEVICE, CPU)}
    return {
        "devices": {name: found.device.type for name, found in sums.items()},
        "equal": all(torch.equal(found.cpu(), vector) for found in sums.values()),
    }


def pipelined(offload: bool) -> dict[str, Any]:
    """Make eight steps in which a group of one stage sums: NCCL's all-reduce runs, and nothing waits for it."""
    weights = []
    for pooled in (True, False):
        where = DEVICE if pooled and not offload else CPU
        net = on_cpu(torch.float64).to(where)
        optimizer = AMAdamW(groups_of(net), lr=0.3, scope="global")
        if pooled:
            optimizer.pipeline_group = dist.group.WORLD
        for step in range(8):
            optimizer.zero_grad()
            x, y = (part.to(where) for part in batch_of(step, torch.float64))
            F.mse_loss(net(x), y).backward()
            with no_sync() if pooled and step > 1 and not offload else torch.no_grad():
                norm = clip_grad_norm_(optimizer, 0.5)
                optimizer.step()
        weights.append([p.detach().cpu() for p in net.parameters()])
    off = max(float((a - b).abs().max()) for a, b in zip(*weights, strict=True))
    return {"off": off, "norm": float(norm), "collectives": optimizer.layout.collectives}


def waits(layout: str) -> list[float]:
    """Make steps of a sharded model in which nothing waits; return beta_t of the last."""
    placed = LAYOUTS[layout][0](torch.float32)
    optimizer = steps.optimizer_of(placed, "adamw", "tensor")
    for step in range(5):
        optimizer.zero_grad()
        x, y = (part.chunk(placed.share[1])[placed.share[0]].to(DEVICE) for part in batch_of(step, torch.float32))
        F.mse_loss(placed.model(x), y).backward()
        with no_sync() if step > 1 else torch.no_grad():
            clip_grad_norm_(optimizer, 0.05)
            optimizer.step()
    return [float(beta) for beta in optimizer.momentum().values()]


def mixed_precision() -> dict[str, Any]:
    """Train FSDP2 with bfloat16 weights and gradients of a float32 model: views of one buffer at any alignment."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net = shard(make_net(torch.float32), mesh=mesh(dist.get_world_size()), mp_policy=policy)
    optimizer = AMAdamW(groups_of(net), lr=0.05)
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        x, y = (part.to(DEVICE) for part in batch_of(step, torch.float32))
        loss = F.mse_loss(net(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    offsets = {local(p.grad).data_ptr() % 16 for p in net.parameters() if local(p.grad).numel()}
    return {"losses": losses, "offsets": sorted(offsets), "described": optimizer.describe()}
