"""Functions that each rank runs: training under a DeepSpeed engine beside one float64 process with the whole model."""

from __future__ import annotations

import logging
import os
import sysconfig
from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock, patch

from tests.device import DEVICE
from tests.sharding.frames import count_frames

os.environ.setdefault("DS_ACCELERATOR", DEVICE.type)
os.environ["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"  # ninja is beside python
os.environ.setdefault("LOCAL_RANK", os.environ.get("RANK", "0"))

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

from am_lightning import AMAdamW
from am_lightning.distributed import ShardLayout, layout
from tests.sharding.model import interior_share

deepspeed.utils.logger.setLevel(logging.ERROR)

STEPS, CLIP, BATCH = 12, 0.5, 16
RATES = {"tensor": (0.08, 0.04), "group": (0.08, 0.04), "global": (0.25, 0.15)}  # one per group; the run overshoots
DECAYS = (0.1, 0.0)


def make_net() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Linear(7, 13), nn.Tanh(), nn.LayerNorm(13), nn.Linear(13, 11), nn.Tanh(), nn.Linear(11, 3)
    ).double()
    with torch.no_grad():
        for param in net.parameters():
            param.uniform_(-0.4, 0.4, generator=generator)
    return net


def groups_of(net: nn.Module, scope: str) -> list[dict[str, Any]]:
    """Return two groups, the matrices and the rest, each with its own learning rate and decay."""
    named = list(net.named_parameters())
    parts = ([e for e in named if e[1].ndim == 2], [e for e in named if e[1].ndim != 2])
    return [
        {"params": part, "weight_decay": decay, "lr": rate}
        for part, decay, rate in zip(parts, DECAYS, RATES[scope], strict=True)
    ]


def batch_of(step: int, micro: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """Return this rank's share of a micro batch, which is the same for every number of ranks."""
    generator = torch.Generator().manual_seed(1000 * (step % 2) + micro)
    x = torch.randn(BATCH, 7, generator=generator, dtype=torch.float64).chunk(world)[rank]
    return x, 3 * torch.sin(2 * x[:, :3])


def schedule(optimizer: torch.optim.Optimizer, step: int, scope: str) -> None:
    for group, rate in zip(optimizer.param_groups, RATES[scope], strict=True):
        group["lr"] = rate * (1.0 - 0.05 * step) * (2.0 if step % 2 else 1.0)


def config_of(
    stage: int, dtype: str = "float32", accumulate: int = 1, clip: float = CLIP, **zero: Any
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "sub_group_size": 40,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 0,
            **zero,
        },
    }
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
    if dtype == "bfloat16, float32 sums":  # BF16_Optimizer
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if dtype == "float16":  # the first steps overflow
        config["fp16"] = {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 1000, "hysteresis": 1}
    return config


def start(stage: int, scope: str, config: dict[str, Any], **options: Any) -> tuple[Any, AMAdamW]:
    """Return the engine and the optimizer that it was given."""
    torch.manual_seed(0)
    net = make_net().float()
    optimizer = AMAdamW(groups_of(net, scope), betas=(0.89, 0.999), scope=scope, **options)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    return engine, optimizer


def advance(engine: Any, optimizer: AMAdamW, scope: str, steps: range, accumulate: int = 1) -> list[dict[str, float]]:
    """Make steps and return beta_t by name after each."""
    seen = []
    for step in steps:
        train(engine, optimizer, scope, range(step, step + 1), accumulate)
        seen.append({name: float(beta) for name, beta in optimizer.momentum().items()})
    return seen


def train(engine: Any, optimizer: torch.optim.Optimizer, scope: str, steps: range, accumulate: int = 1) -> None:
    dtype = next(engine.module.parameters()).dtype
    for step in steps:
        schedule(optimizer, step, scope)
        for micro in range(accumulate):
            x, y = batch_of(step, micro, dist.get_rank(), dist.get_world_size())
            loss = (engine(x.to(engine.device, dtype)).float() - y.to(engine.device).float()).square().mean()
            engine.backward(loss)
            engine.step()


def whole_weights(engine: Any, stage: int, dtype: str) -> dict[str, Tensor]:
    found = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=stage == 3):
            exact = stage == 0 or dtype == "float32"
            found[name] = (param if exact else safe_get_full_fp32_param(param)).detach().double().cpu().clone()
    return found


def alone(scope: str, steps: int = STEPS, accumulate: int = 1, clip: float = CLIP) -> dict[str, Any]:
    """Return the float64 run of one process."""
    net = make_net()
    optimizer = AMAdamW(groups_of(net, scope), betas=(0.89, 0.999), scope=scope)
    seen = []
    for step in range(steps):
        schedule(optimizer, step, scope)
        optimizer.zero_grad()
        for micro in range(accumulate):
            x, y = batch_of(step, micro)
            ((net(x) - y).square().mean() / accumulate).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        seen.append({name: float(beta) for name, beta in optimizer.momentum().items()})
    weights = {name: param.detach() for name, param in net.named_parameters()}
    return {"seen": seen, "weights": weights, "share": interior_share(seen, "adamw")}


def compare(
    stage: int,
    scope: str = "tensor",
    dtype: str = "float32",
    accumulate: int = 1,
    attach: bool = False,
    naive: bool = False,
    fused: bool | None = None,
    **zero: Any,
) -> dict[str, Any]:
    """Return the largest errors of beta_t and weights; ``naive`` leaves out the reduction."""
    engine, optimizer = start(stage, scope, config_of(stage, dtype, accumulate, **zero), fused=fused)
    if attach:
        from am_lightning.deepspeed import attach as attach_engine

        attach_engine(engine)
    local = patch.object(ShardLayout, "all_reduce", lambda self, packed, shared=None: (packed, shared))
    counter = Mock(wraps=layout.all_reduce)  # every sum over ranks uses it
    counted = patch.multiple(layout, all_reduce=counter), patch("am_lightning.deepspeed.engine.all_reduce", counter)
    with local if naive else nullcontext(), counted[0], counted[1]:
        seen = advance(engine, optimizer, scope, range(STEPS), accumulate)
    single = alone(scope, accumulate=accumulate)
    off = [abs(ours[n] - b) for ours, theirs in zip(seen, single["seen"], strict=True) for n, b in theirs.items()]
    weights = whole_weights(engine, stage, dtype)
    return {
        "beta": max(off),
        "weights": max(float((weights[n] - w).abs().max()) for n, w in single["weights"].items()),
        "share": single["share"],
        "bits": [{n: b.hex() for n, b in step.items()} for step in seen],
        "names": list(seen[0]),
        "engine": type(engine.optimizer).__name__,
        "kernels": optimizer.describe(),
        "sums": counter.call_count,
        "partitions": len(getattr(engine.optimizer, "fp32_partitioned_groups_flat", groups_of(engine.module, scope))),
    }


def frames_walked(stage: int, attach: bool) -> list[int]:
    """Return how many frames of the call stack each of five steps looks at."""
    engine, optimizer = start(stage, "tensor", config_of(stage))
    if attach:
        from am_lightning.deepspeed import attach as attach_engine

        attach_engine(engine)
    found = []
    for step in range(5):
        with count_frames() as counter:
            advance(engine, optimizer, "tensor", range(step, step + 1))
        found.append(counter[0])
    return found


def compare_in_16_bit(stage: int, scope: str = "tensor", dtype: str = "bfloat16", **zero: Any) -> dict[str, Any]:
    """Compare with one process that gets the engine's own gradients, which a public call of DeepSpeed gathers."""
    if dtype == "float16":
        allow_float16()
    engine, optimizer = start(stage, scope, config_of(stage, dtype, clip=0.0, **zero))
    if scope != "tensor":
        from am_lightning.deepspeed import attach as attach_engine

        attach_engine(engine)
    half = torch.float16 if dtype == "float16" else torch.bfloat16
    single = make_net().to(half).double()  # the engine's master copies start from the rounded weights
    reference = AMAdamW(groups_of(single, scope), betas=(0.89, 0.999), scope=scope)
    off, seen, dropped = [], [], 0
    for step in range(STEPS):
        schedule(optimizer, step, scope)
        schedule(reference, step, scope)
        x, y = batch_of(step, 0, dist.get_rank(), dist.get_world_size())
        loss = (engine(x.to(engine.device, half)).float() - y.to(engine.device).float()).square().mean()
        engine.backward(loss)
        scale = engine.optimizer.loss_scale if dtype == "float16" else 1.0
        for (_, given), param in zip(engine.module.named_parameters(), single.parameters(), strict=True):
            param.grad = safe_get_full_grad(given).double().cpu().reshape(param.shape) / scale
        engine.step()
        if engine.skipped_steps > dropped:
            dropped = engine.skipped_steps
            continue
        reference.step()
        seen.append({name: float(beta) for name, beta in optimizer.momentum().items()})
        off += [abs(seen[-1][name] - float(beta)) for name, beta in reference.momentum().items()]
    weights = whole_weights(engine, stage, dtype)
    return {
        "beta": max(off),
        "weights": max(float((weights[n] - w.detach()).abs().max()) for n, w in single.named_parameters()),
        "share": interior_share(seen, "adamw"),
        "bits": [{n: b.hex() for n, b in step.items()} for step in seen],
        "names": list(seen[0]),
        "dropped": dropped,
        "engine": type(engine.optimizer).__name__,
    }


def allow_float16() -> None:
    """Enable float16, which torch has and DeepSpeed's CPU accelerator denies."""
    if DEVICE.type != "cpu":
        return
    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]
