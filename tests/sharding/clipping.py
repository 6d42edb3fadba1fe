"""Functions that each rank runs: clip_grad_norm_ at every step beside torch's in one process with the whole model."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from am_lightning import clip_grad_norm_
from am_lightning.distributed.names import strip_wrappers
from am_lightning.distributed.strategies.dtensor import local
from tests.device import DEVICE
from tests.sharding.layouts import LAYOUTS
from tests.sharding.model import (
    RATES,
    batch_of,
    beside,
    groups_of,
    interior_share,
    make_net,
    make_optimizer,
    raw_betas,
    train,
)
from tests.sharding.steps import optimizer_of, raw_error, whole_weights

DTYPE = torch.float64
# Below the norm (before the first step(), too), above it, none, below, below, far below.
LIMITS = (0.1, 5.0, math.inf, 0.05, 0.06, 0.01)


def rate_of(kind: str, scope: str) -> float:
    """Return the learning rate. SGD's clipped gradients are small, so it overshoots at a larger rate only."""
    return 20.0 if kind == "sgd" else RATES[kind][scope]


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Map each name to its full gradient on every rank; empty for flat parameters. Collective."""
    if not isinstance(model, FSDP):
        grads = {strip_wrappers(n): p.grad for n, p in model.named_parameters()}
        return {n: (g.full_tensor() if isinstance(g, DTensor) else g.clone()).cpu() for n, g in grads.items()}
    if any(hasattr(p, "_fqns") for p in model.parameters()):
        return {}
    with FSDP.summon_full_params(model, with_grads=True):
        return {strip_wrappers(n): p.grad.clone().cpu() for n, p in model.named_parameters()}


def bits(model: nn.Module) -> list[bytes]:
    return [local(p.grad).cpu().numpy().tobytes() for p in model.parameters() if p.grad is not None]


def clipper(
    norms: list[float], gradients: list[dict[str, Tensor]], model: nn.Module, clip: Callable[[float], Tensor]
) -> Callable[[int], None]:
    def before_step(step: int) -> None:
        norms.append(float(clip(LIMITS[step])))
        gradients.append(whole_gradients(model))

    return before_step


@functools.cache
def reference(kind: str, scope: str, flat: bool) -> dict[str, Any]:
    """Clip with torch.nn.utils.clip_grad_norm_ in one process."""
    net, norms, gradients = make_net(DTYPE), [], []
    params = list(net.named_parameters()) if flat else groups_of(net)
    optimizer = make_optimizer(kind, params, scope, **({"weight_decay": 0.1} if flat else {}))
    before = clipper(norms, gradients, net, functools.partial(nn.utils.clip_grad_norm_, list(net.parameters())))
    with raw_betas(scope) as raw:
        seen = train(net, optimizer, range(len(LIMITS)), DTYPE, rate=rate_of(kind, scope), before_step=before)
    by_name = [dict(zip(optimizer.parameter_names(), row, strict=True)) for row in raw]
    weights = {name: param.detach() for name, param in net.named_parameters()}
    share = interior_share(seen, kind)
    return {"norms": norms, "gradients": gradients, "raw": by_name, "seen": seen, "weights": weights, "share": share}


def compare(layout: str, kind: str, scope: str) -> dict[str, Any]:
    """Return the largest relative errors of norms, gradients, raw beta_t and weights, bits of infinity, collectives."""
    placed = LAYOUTS[layout][0](DTYPE)
    optimizer, model = optimizer_of(placed, kind, scope), placed.model
    norms, gradients, unlike, clips, steps = [], [], [], [], []

    def clip(limit: float) -> Tensor:
        before = bits(model)
        counting = len(clips) < 2  # counting is slow
        with CommDebugMode() if counting else nullcontext() as mode:
            norm = clip_grad_norm_(optimizer, limit)
        if counting:
            clips.append({str(operator): n for operator, n in mode.get_comm_counts().items() if n})
        unlike.append(bits(model) != before)
        return norm

    options = {"share": placed.share, "device": DEVICE, "rate": rate_of(kind, scope), "counts": steps}
    with raw_betas(scope) as raw:
        before_step = clipper(norms, gradients, model, clip)
        seen = train(model, optimizer, range(len(LIMITS)), DTYPE, before_step=before_step, **options)
    single = reference(kind, scope, "flat" in layout)
    weights = whole_weights(model)
    steps_of_both = list(zip(gradients, single["gradients"], strict=True))
    rows = beside(raw, optimizer.parameter_names(), seen, single)
    return {
        "norm": max(raw_error(n, s) for n, s in zip(norms, single["norms"], strict=True)),
        "gradients": max((relative(ours[n], theirs[n]) for ours, theirs in steps_of_both for n in ours), default=0.0),
        "raw": max(raw_error(ours[n], theirs[n]) for ours, theirs in rows for n in theirs),
        "weights": max(relative(weights[n], w) for n, w in single["weights"].items()),
        "norm_bits": [norm.hex() for norm in norms],
        "unlike": unlike,
        "clips": clips,
        "steps": steps,
        "collectives": placed.collectives,
        "votes": kind == "adamw",
        "partial": placed.partial,
        "share": single["share"],
        "clipped": [norm > limit for norm, limit in zip(single["norms"], LIMITS, strict=True)],
    }


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def refused(layout: str, cure: bool) -> dict[str, Any]:
    """Clip without knowledge of the whole model. With ``cure``, follow the message and clip again."""
    placed = LAYOUTS[layout][0](DTYPE)
    placed.options, groups = {}, placed.options
    optimizer = optimizer_of(placed, "adamw", "tensor")
    x, y = (part.chunk(placed.share[1])[placed.share[0]].to(DEVICE) for part in batch_of(0, DTYPE))
    torch.nn.functional.mse_loss(placed.model(x), y).backward()
    before, text = bits(placed.model), None
    try:
        clip_grad_norm_(optimizer, 0.1)
    except ValueError as error:
        text = str(error)
    found = {"text": text, "unlike": bits(placed.model) != before}
    if cure:
        if groups:
            optimizer.replica_group = groups["replica_group"]
        else:
            optimizer.bind_model(placed.model)
        found["norm"] = float(clip_grad_norm_(optimizer, math.inf)) / reference("adamw", "tensor", False)["norms"][0]
    return found


def one_nan(layout: str) -> dict[str, Any]:
    """Make a gradient on the last rank alone not finite."""
    placed = LAYOUTS[layout][0](DTYPE)
    optimizer = optimizer_of(placed, "adamw", "tensor")
    weights = [local(param).detach().clone() for param in placed.model.parameters()]
    for param in placed.model.parameters():
        param.grad = torch.ones_like(param)
    if dist.get_rank() == dist.get_world_size() - 1:
        next(g for g in (local(p.grad) for p in placed.model.parameters()) if g.numel()).view(-1)[0] = math.nan
    norm = clip_grad_norm_(optimizer, 1.0)
    optimizer.step()
    moved = any(not torch.equal(local(p), w) for p, w in zip(placed.model.parameters(), weights, strict=True))
    return {"norm": float(norm), "skipped": bool(optimizer.last_step_skipped), "moved": moved}
