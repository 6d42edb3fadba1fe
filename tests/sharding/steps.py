"""What each rank runs for the table of layouts: train a few steps beside one process that holds the whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
from torch.distributed.tensor import DTensor

from am_lightning.names import strip_wrappers
from tests.sharding.layouts import LAYOUTS, Placed
from tests.sharding.model import RATES, groups_of, interior_share, make_net, make_optimizer, raw_betas, train

STEPS = 8


def optimizer_of(placed: Placed, kind: str, scope: str, **options: Any) -> torch.optim.Optimizer:
    flat = isinstance(placed.model, FSDP) and any(hasattr(p, "_fqns") for p in placed.model.parameters())
    decay = {"weight_decay": 0.1} if flat else {}  # one decay for all: a flat parameter is in one group
    params = list(placed.model.parameters()) if flat else groups_of(placed.model)
    optimizer = make_optimizer(kind, params, scope, **decay, **placed.options, **options)
    if placed.bind:
        optimizer.bind_model(placed.model)
    return optimizer


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name -> full tensor, on every rank. Collective."""
    if isinstance(model, FSDP):
        with FSDP.summon_full_params(model):
            return {strip_wrappers(n): p.detach().clone() for n, p in model.named_parameters()}
    found = {strip_wrappers(n): p.detach() for n, p in model.named_parameters()}
    return {n: p.full_tensor() if isinstance(p, DTensor) else p.clone() for n, p in found.items()}


def alone(kind: str, scope: str, dtype: torch.dtype, flat: bool, steps: int = STEPS) -> dict[str, Any]:
    """The run of one process."""
    net = make_net(dtype)
    params = list(net.named_parameters()) if flat else groups_of(net)
    optimizer = make_optimizer(kind, params, scope, **({"weight_decay": 0.1} if flat else {}))
    with raw_betas(scope) as raw:
        seen = train(net, optimizer, range(steps), dtype, rate=RATES[kind][scope])
    by_name = [dict(zip(optimizer.parameter_names(), row, strict=True)) for row in raw]
    return {"seen": seen, "raw": by_name, "weights": dict(net.named_parameters()), "share": interior_share(seen, kind)}


def compare(layout: str, kind: str, scope: str, dtype: str) -> dict[str, Any]:
    """One row of the table: largest relative error of raw beta_t, bits that all ranks must share, collectives."""
    precision = getattr(torch, dtype)
    torch.manual_seed(0)
    placed = LAYOUTS[layout][0](precision)
    optimizer = optimizer_of(placed, kind, scope)
    rate, counts = RATES[kind][scope], []
    with raw_betas(scope) as raw:
        seen = train(placed.model, optimizer, range(STEPS), precision, share=placed.share, rate=rate, counts=counts)
    single = alone(kind, scope, precision, "flat" in layout)
    names = optimizer.parameter_names()
    errors = [
        abs(ours - theirs[name]) / (abs(theirs[name]) + 0.1)
        for row, theirs in zip(raw, single["raw"], strict=True)
        for name, ours in zip(names, row, strict=True)
        if ours == ours or theirs[name] == theirs[name]
    ]
    weights = whole_weights(placed.model)
    off = [float((weights[n] - w).abs().max()) for n, w in single["weights"].items()]
    return {
        "raw": max(errors),
        "compared": len(errors),
        "weights": max(off),
        "bits": [{n: b.hex() for n, b in step.items()} for step in seen],
        "weight_bits": {n: w.flatten().tolist() for n, w in weights.items()},
        "names": sorted(names) == sorted(single["weights"]),
        "collectives": counts,
        "described": optimizer.current_layout().describe(),
        "share": single["share"],
        "expected": placed.collectives,
    }
