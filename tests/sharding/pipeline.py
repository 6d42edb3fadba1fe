"""Functions that each rank runs: one of two stages, with gradients that one process computed for the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

from am_lightning import clip_grad_norm_
from am_lightning.distributed.strategies.dtensor import local
from tests.sharding.layouts import mesh, spread
from tests.sharding.model import (
    RATES,
    batch_of,
    groups_of,
    interior_share,
    is_plain_decay,
    lr_of,
    make_net,
    make_optimizer,
)
from tests.sharding.steps import STEPS, raw_error

DTYPE = torch.float64
Place = Callable[[str, Tensor], Tensor]


@dataclass
class Stage:
    """This rank's tensors of the whole model, and their placement over the ranks of the stage.

    Attributes:
        place: (name, full tensor) -> this rank's tensor.
        options: options of the optimizer.
        stages: group of one rank of each stage.
        inside: group of the ranks of this stage.
    """

    number: int
    place: Place
    options: dict[str, Any]
    stages: Any
    inside: Any

    def __post_init__(self) -> None:
        full = {n: p.detach() for n, p in make_net(DTYPE).named_parameters()}
        names = [n for n in full if self.holds(n)]
        self.params = {n: nn.Parameter(self.place(n, full[n])) for n in names}

    def holds(self, name: str) -> bool:
        return (name.startswith(("shift", "blocks.0"))) == (self.number == 0)

    def groups(self) -> list[dict[str, Any]]:
        named = list(self.params.items())
        return [
            {"params": [(n, p) for n, p in named if is_plain_decay(n)], "weight_decay": 0.1},
            {"params": [(n, p) for n, p in named if not is_plain_decay(n)], "weight_decay": 0.0},
        ]


def stage_of(layout: str) -> Stage:
    """Return the stage: "alone" is for 2 ranks, the others for 4, which are two stages of two."""
    if layout == "alone":
        grid = mesh(2, names=("pp",))
        return Stage(grid.get_local_rank(), lambda name, full: full.clone(), {}, grid.get_group(), None)
    inner = "tp" if layout == "tp" else "dp"
    grid = mesh(2, 2, names=("pp", inner))
    number, stages, inside = grid["pp"].get_local_rank(), grid["pp"].get_group(), grid[inner].get_group()
    if layout == "ddp":
        return Stage(number, lambda name, full: full.clone(), {"replica_group": inside}, stages, inside)

    def place(name: str, full: Tensor) -> Tensor:
        if layout == "fsdp":
            placement: Placement = Shard(0)
        elif full.ndim == 1 and "norm" not in name:
            return full.clone()
        else:
            placement = Replicate() if "norm" in name else Shard(1)
        return spread(full, grid[inner], [placement])

    return Stage(number, place, {}, stages, inside)


class Whole:
    """Hold both stages in one process."""

    def __init__(self, kind: str, scope: str) -> None:
        self.net, self.rate = make_net(DTYPE), RATES[kind][scope]
        self.optimizer = make_optimizer(kind, groups_of(self.net), scope)

    def gradients(self, step: int) -> dict[str, Tensor]:
        x, y = batch_of(step, DTYPE)
        self.optimizer.zero_grad()
        F.mse_loss(self.net(x), y).backward()
        return {name: param.grad.clone() for name, param in self.net.named_parameters()}


def optimizer_of(stage: Stage, kind: str, scope: str, pipeline: str | None, groups: Any = None) -> Any:
    """Build the optimizer. ``pipeline`` selects the group that is given as that of the stages."""
    optimizer = make_optimizer(kind, stage.groups() if groups is None else groups, scope, **stage.options)
    optimizer.pipeline_group = {"stages": stage.stages, "inside": stage.inside, "world": dist.group.WORLD}.get(pipeline)
    return optimizer


def run(layout: str, kind: str, scope: str, pipeline: str | None, clip: float | None = None) -> dict[str, Any]:
    """Train the whole model here beside this stage of it; return the largest errors."""
    stage, whole = stage_of(layout), Whole(kind, scope)
    optimizer = optimizer_of(stage, kind, scope, pipeline)
    counts, norms, errors, bits, whole_run = [], [], [], [], []
    for step in range(STEPS):
        gradients = whole.gradients(step)
        for name, param in stage.params.items():
            param.grad = stage.place(name, gradients[name])
        for each in (whole.optimizer, optimizer):
            for group in each.param_groups:
                group["lr"] = lr_of(step, whole.rate)
        counting = len(counts) < 2  # counting is slow
        with CommDebugMode() if counting else nullcontext() as mode:
            if clip is not None:
                ours = clip_grad_norm_(optimizer, clip)
                norms.append(raw_error(float(ours), float(nn.utils.clip_grad_norm_(whole.net.parameters(), clip))))
            optimizer.step()
        if counting:
            counts.append({str(operator): n for operator, n in mode.get_comm_counts().items() if n})
        whole.optimizer.step()
        expected, found = whole.optimizer.momentum(), optimizer.momentum()
        errors += [raw_error(float(beta), float(expected[name])) for name, beta in found.items()]
        whole_run.append({name: float(beta) for name, beta in expected.items()})
        bits.append({name: float(beta).hex() for name, beta in found.items()})
    weights = dict(whole.net.named_parameters())
    pairs = [(full(param), weights[name].detach()) for name, param in stage.params.items()]
    return {
        "stage": stage.number,
        "names": sorted(stage.params),
        "momentum": sorted(found),
        "beta": max(errors),
        "norm": max(norms, default=0.0),
        "weights": max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs),
        "bits": bits,
        "collectives": counts,
        "share": interior_share(whole_run, kind),
    }


def full(param: Tensor) -> Tensor:
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach()


def attempt(layout: str, scope: str, pipeline: str | None, what: str = "step", cure: bool = False) -> dict[str, Any]:
    """Make a step or clip, which may be refused. With ``cure``, do it again with the right group."""
    stage = stage_of(layout)
    groups = [{"params": list(stage.params.items())}] if what == "uneven" and stage.number else None
    optimizer = optimizer_of(stage, "adamw", scope, pipeline, groups)
    for param in stage.params.values():
        param.grad = torch.ones_like(param)
    act = (lambda: clip_grad_norm_(optimizer, 1.0)) if what == "clip" else optimizer.step
    before, text = [local(param).detach().clone() for param in stage.params.values()], None
    try:
        act()
    except ValueError as error:
        text = str(error)
    found = {"text": text, "moved": moved(stage, before), "states": len(optimizer.state)}
    if cure:
        optimizer.pipeline_group = stage.stages
        act()
        found["cured"] = moved(stage, before) or what == "clip"
    return found


def moved(stage: Stage, before: list[Tensor]) -> bool:
    return any(not torch.equal(local(p), b) for p, b in zip(stage.params.values(), before, strict=True))


def one_nan(layout: str, scope: str, pipeline: str | None) -> dict[str, Any]:
    """Make a gradient of the last rank not finite in the second step."""
    stage = stage_of(layout)
    optimizer = optimizer_of(stage, "adamw", scope, pipeline)
    found = []
    for step in range(3):
        for param in stage.params.values():
            param.grad = torch.ones_like(param) * (step + 1)
        if step == 1 and dist.get_rank() == dist.get_world_size() - 1:
            next(piece for piece in map(local, grads(stage)) if piece.numel()).view(-1)[0] = math.nan
        before = [local(param).detach().clone() for param in stage.params.values()]
        optimizer.step()
        found.append((bool(optimizer.last_step_skipped), moved(stage, before)))
    return {"stage": stage.number, "skipped": [s for s, _ in found], "moved": [m for _, m in found]}


def grads(stage: Stage) -> list[Tensor]:
    return [param.grad for param in stage.params.values()]
