"""Functions that each rank of a pool runs: a Fabric loop with ``attach``, under DDP, FSDP1 and FSDP2."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

from am_lightning import AMAdamW, clip_grad_norm_
from am_lightning.lightning import attach
from tests.device import ACCELERATOR, BACKEND, ON_GPU
from tests.lightning.cluster import LONGEST, Memory, on_cpu
from tests.sharding.layouts import shard
from tests.sharding.model import RATES, Block, batch_of, lr_of, make_net

STEPS, CLIP, EVERY = 8, 0.05, 2


class CPUFSDP(FSDPStrategy):
    """FSDP1 on the CPU, as in tests.lightning.cluster."""

    def setup_module(self, module: torch.nn.Module) -> torch.nn.Module:
        return on_cpu(super().setup_module, module)


def strategy_of(placed: str, world: int) -> Any:
    if placed == "ddp":
        return DDPStrategy(process_group_backend=BACKEND, timeout=LONGEST)
    if placed == "fsdp1":
        return (FSDPStrategy if ON_GPU else CPUFSDP)(auto_wrap_policy={Block}, timeout=LONGEST)
    return ModelParallelStrategy(
        lambda module, mesh: shard(module, mesh=mesh["data_parallel"]),
        data_parallel_size=world,
        tensor_parallel_size=1,
        timeout=LONGEST,
    )


def set_up(fabric: Fabric, placed: str) -> tuple[Any, Any]:
    """Set up model and optimizer. ModelParallelStrategy needs the model before the optimizer is built."""
    net = make_net(torch.float32)
    if placed == "fsdp2":
        model = fabric.setup_module(net)
        return model, fabric.setup_optimizers(optimizer_of(model))
    return fabric.setup(net, optimizer_of(net))


def optimizer_of(net: torch.nn.Module) -> AMAdamW:
    return AMAdamW(net.parameters(), lr=RATES["adamw"]["tensor"], betas=(0.89, 0.95), weight_decay=0.1)


def fit(placed: str, folder: str) -> dict[str, Any]:
    """Run a loop under Fabric that logs to ``folder``; return what the optimizer recorded at every step."""
    warnings.simplefilter("ignore")
    world = dist.get_world_size()
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    memory = Memory()
    fabric = Fabric(
        accelerator=ACCELERATOR,
        devices=world,
        strategy=strategy_of(placed, world),
        plugins=[LightningEnvironment()],
        loggers=[TensorBoardLogger(folder, name=placed, version="run"), memory],
    )
    fabric.launch()
    model, optimizer = set_up(fabric, placed)
    refused = ""
    try:
        attach(fabric, model.module, optimizer)  # the module inside the outermost FSDP module
    except ValueError as error:
        refused = str(error)
    attach(fabric, model, optimizer, log_every_n_steps=1)
    attach(fabric, model, optimizer, log_every_n_steps=EVERY)  # a second interval, but no second log
    fabric.save(Path(folder) / f"{placed}.fresh", {"model": model, "optimizer": optimizer})  # FSDP2: creates the state
    seen, calls = loop(fabric, model, optimizer)
    fabric.loggers[0].finalize("success")
    replicas = optimizer.optimizer.replica_group is not None
    logged = len(memory.logged)
    return {"seen": seen, "all_reduces": calls, "replicas": replicas, "refused": refused, "logged": logged}


def loop(fabric: Fabric, model: Any, optimizer: Any) -> tuple[list[dict[str, float]], int]:
    seen, calls, original = [], 0, dist.all_reduce

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **options)

    dist.all_reduce = counted
    try:
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = RATES["adamw"]["tensor"] * lr_of(step, 1.0)
            parts = (t.chunk(fabric.world_size)[fabric.global_rank] for t in batch_of(step, torch.float32))
            x, y = (part.to(fabric.device) for part in parts)
            optimizer.zero_grad()
            fabric.backward(F.mse_loss(model(x), y))
            clip_grad_norm_(optimizer, CLIP)
            optimizer.step()
            seen.append({name: float(beta) for name, beta in optimizer.momentum().items()})
    finally:
        dist.all_reduce = original
    return seen, calls


def alone() -> tuple[list[dict[str, float]], list[float]]:
    """Return the betas and norms of the same loop in one process without Fabric."""
    net = make_net(torch.float32)
    optimizer = optimizer_of(net)
    optimizer.bind_model(net)
    seen, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATES["adamw"]["tensor"] * lr_of(step, 1.0)
        x, y = batch_of(step, torch.float32)
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)))
        optimizer.step()
        seen.append({name: float(beta) for name, beta in optimizer.momentum().items()})
    return seen, norms
