"""Functions that each rank runs for checkpoints: train and save, then load into a new engine and continue."""

from __future__ import annotations

import warnings
from typing import Any

import deepspeed
import torch

from am_lightning import AMAdamW
from tests.deepspeed.runs import (
    CLIP,
    advance,
    alone,
    batch_of,
    config_of,
    groups_of,
    make_net,
    schedule,
    start,
    train,
    whole_weights,
)

HALF, END = 4, 8


def save(folder: str, stage: int, scope: str = "tensor", dtype: str = "float32") -> None:
    engine, optimizer = start(stage, scope, config_of(stage, dtype))
    attach(engine, scope)
    advance(engine, optimizer, scope, range(HALF))
    engine.save_checkpoint(folder, tag="half")


def attach(engine: Any, scope: str) -> None:
    if scope != "tensor":
        from am_lightning.deepspeed import attach as attach_engine

        attach_engine(engine)


def resume(folder: str, stage: int, scope: str = "tensor", dtype: str = "float32", universal: bool = False) -> Any:
    """Return the largest errors of beta_t and weights after four more steps, against one unbroken process."""
    config = config_of(stage, dtype)
    if universal:
        config["checkpoint"] = {"load_universal": True}
    engine, optimizer = start(stage, scope, config)
    attach(engine, scope)
    engine.load_checkpoint(folder, tag="universal" if universal else "half")
    seen = advance(engine, optimizer, scope, range(HALF, END))
    single = alone(scope, steps=END)
    pairs = zip(seen, single["seen"][HALF:], strict=True)
    weights = whole_weights(engine, stage, dtype)
    return {
        "beta": max(abs(ours[n] - b) for ours, theirs in pairs for n, b in theirs.items()),
        "weights": max(float((weights[n] - w).abs().max()) for n, w in single["weights"].items()),
        "bits": [{n: b.hex() for n, b in step.items()} for step in seen],
        "decays": [group["weight_decay"] for group in optimizer.param_groups],
        "keys": sorted({key for group in optimizer.param_groups for key in group}),
    }


def take_over(folder: str, stage: int) -> dict[str, Any]:
    """Train AdamW for four steps under one engine and load its checkpoint into AMAdamW under another."""
    net = make_net().float()
    plain = torch.optim.AdamW(groups_of(net, "tensor"), betas=(0.89, 0.999))
    engine, *_ = deepspeed.initialize(model=net, optimizer=plain, config=config_of(stage))
    train(engine, plain, "tensor", range(HALF))
    engine.save_checkpoint(folder, tag="half")
    engine, optimizer = start(stage, "tensor", config_of(stage))
    engine.load_checkpoint(folder, tag="half")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = advance(engine, optimizer, "tensor", range(HALF, END))
    single = make_net()
    before = torch.optim.AdamW(groups_of(single, "tensor"), betas=(0.89, 0.999))
    _steps(single, before, range(HALF))
    after = AMAdamW(groups_of(single, "tensor"), betas=(0.89, 0.999))
    after.load_state_dict(before.state_dict())
    expected = _steps(single, after, range(HALF, END))
    weights = whole_weights(engine, stage, "float32")
    pairs = zip(seen, expected, strict=True)
    return {
        "beta": max(abs(ours[n] - b) for ours, theirs in pairs for n, b in theirs.items()),
        "weights": max(float((weights[n] - w.detach()).abs().max()) for n, w in single.named_parameters()),
        "warnings": [str(entry.message) for entry in caught],
    }


def _steps(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[dict[str, float]]:
    seen = []
    for step in steps:
        schedule(optimizer, step, "tensor")
        optimizer.zero_grad()
        x, y = batch_of(step, 0)
        (net(x) - y).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        if isinstance(optimizer, AMAdamW):
            seen.append({name: float(beta) for name, beta in optimizer.momentum().items()})
    return seen
