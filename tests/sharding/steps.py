"""Functions that each rank runs for the table of layouts: train beside one process that holds the whole model."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
from torch.distributed.tensor import DTensor

from am_lightning.distributed.names import strip_wrappers
from am_lightning.distributed.strategies.dtensor import local
from tests.device import DEVICE
from tests.sharding.layouts import LAYOUTS, Placed
from tests.sharding.model import RATES, beside, groups_of, interior_share, make_net, make_optimizer, raw_betas, train

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
    """Map each name to its full tensor on the CPU, on every rank. Collective."""
    if isinstance(model, FSDP):
        with FSDP.summon_full_params(model):
            return {strip_wrappers(n): p.detach().clone().cpu() for n, p in model.named_parameters()}
    found = {strip_wrappers(n): p.detach() for n, p in model.named_parameters()}
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p.clone()).cpu() for n, p in found.items()}


def alone(kind: str, scope: str, dtype: torch.dtype, flat: bool, steps: int = STEPS) -> dict[str, Any]:
    """Make the run of one process."""
    net = make_net(dtype)
    params = list(net.named_parameters()) if flat else groups_of(net)
    optimizer = make_optimizer(kind, params, scope, **({"weight_decay": 0.1} if flat else {}))
    with raw_betas(scope) as raw:
        seen = train(net, optimizer, range(steps), dtype, rate=RATES[kind][scope])
    by_name = [dict(zip(optimizer.parameter_names(), row, strict=True)) for row in raw]
    weights = {name: param.detach() for name, param in net.named_parameters()}
    return {"seen": seen, "raw": by_name, "weights": weights, "share": interior_share(seen, kind)}


@functools.cache
def reference(kind: str, scope: str, dtype: torch.dtype, flat: bool) -> dict[str, Any]:
    """Return :func:`alone`, cached per rank: do not change it."""
    return alone(kind, scope, dtype, flat)


def raw_error(ours: float, theirs: float) -> float:
    """Return the error, relative except near zero, and infinite if only one of the two is a number."""
    if math.isnan(ours) or math.isnan(theirs):
        return 0.0 if math.isnan(ours) and math.isnan(theirs) else math.inf
    return abs(ours - theirs) / (abs(theirs) + 0.1)


def assert_as_one_process(ranks: list[dict[str, Any]], limit: float) -> None:
    """Check what ``compare`` returned on every rank."""
    first = ranks[0]
    assert first["share"] > 0.2, "the clamps would hide a wrong sum"
    for rank in ranks:
        assert rank["compared"] > 100
        assert rank["raw"] <= limit, f"beta_t is off by {rank['raw']}"
        assert rank["weights"] <= limit, f"weights are off by {rank['weights']}"
        assert rank["bits"] == first["bits"], "beta_t differs between ranks"
        assert rank["weight_bits"] == first["weight_bits"], "weights differ between ranks"
        assert rank["names"] and not rank["missing"], "momentum() must have the whole model on every rank"


def compare(layout: str, kind: str, scope: str, dtype: str, **options: Any) -> dict[str, Any]:
    """Return a row of the table: largest error of raw beta_t, bits that all ranks must share, collectives.

    Args:
        options: options of the optimizer here, not of the run of one process.
    """
    precision = getattr(torch, dtype)
    torch.manual_seed(0)
    placed = LAYOUTS[layout][0](precision)
    optimizer = optimizer_of(placed, kind, scope, **options)
    rate, counts = RATES[kind][scope], []
    where: dict[str, Any] = {"share": placed.share, "device": DEVICE}
    with raw_betas(scope) as raw:
        seen = train(placed.model, optimizer, range(STEPS), precision, **where, rate=rate, counts=counts)
    single = reference(kind, scope, precision, "flat" in layout)
    rows = beside(raw, optimizer.parameter_names(), seen, single)
    errors = [raw_error(beta, theirs[name]) for ours, theirs in rows for name, beta in ours.items()]
    weights = whole_weights(placed.model)
    off = [float((weights[n] - w).abs().max() / w.abs().max()) for n, w in single["weights"].items()]
    return {
        "raw": max(errors),
        "compared": sum(not math.isnan(beta) for ours, _ in rows for beta in ours.values()),
        "weights": max(off),
        "bits": [{n: b.hex() for n, b in step.items()} for step in seen],
        "weight_bits": {n: w.flatten().tolist() for n, w in weights.items()},
        "names": all(sorted(step) == sorted(single["weights"]) for step in seen),
        "missing": sum(math.isnan(beta) for step in seen for beta in step.values()),
        "empty": sum(local(param).numel() == 0 for param in placed.model.parameters()),  # this rank has no element
        "collectives": counts,
        "described": optimizer.describe(),
        "share": single["share"],
        "expected": placed.collectives,
        "partial": placed.partial,
        "votes": placed.collectives if "fused" in optimizer.param_groups[0] else 0,
    }
