"""Functions that each rank runs: steps in which one rank has bad gradients, or none for a module."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from am_lightning import AMAdamW
from am_lightning.distributed.names import strip_wrappers
from am_lightning.distributed.strategies.dtensor import local
from tests.sharding.layouts import LAYOUTS
from tests.sharding.model import RATES, Net, batch_of, groups_of, make_net, make_optimizer, train
from tests.sharding.steps import optimizer_of, whole_weights

DTYPE = torch.float64
BAD, END = 3, 7  # the faulty step, and the number of steps
RATE = RATES["adamw"]["tensor"]


def bits(seen: list[dict[str, float]]) -> list[dict[str, str]]:
    return [{name: beta.hex() for name, beta in step.items()} for step in seen]


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return this rank's weights and states."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [local(tensor.detach()).tolist() for tensor in (*model.parameters(), *states)]


def spoil(model: nn.Module, value: float) -> str:
    """Put ``value`` into one element of a gradient on this rank."""
    for name, param in model.named_parameters():
        if param.grad is not None and local(param.grad).numel() > 0:
            local(param.grad).view(-1)[0] = value
            return strip_wrappers(name)
    raise AssertionError("this rank holds no gradient")


def spoiled_alone(name: str, value: float, nonfinite: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Train in one process in which the gradient of ``name`` is bad in the same step."""
    net = make_net(DTYPE)
    optimizer = make_optimizer("adamw", groups_of(net), "tensor", nonfinite=nonfinite)

    def before_step(step: int) -> None:
        if step == BAD:
            dict(net.named_parameters())[name].grad.view(-1)[0] = value

    seen = train(net, optimizer, range(END), DTYPE, rate=RATE, before_step=before_step)
    return seen, dict(net.named_parameters())


def bad_gradient(layout: str, value: float, where: str, nonfinite: str = "skip") -> dict[str, Any]:
    """Spoil the last rank's gradient, or its part of the batch before backward, in one step."""
    torch.manual_seed(0)
    placed = LAYOUTS[layout][0](DTYPE)
    optimizer = optimizer_of(placed, "adamw", "tensor", nonfinite=nonfinite)
    culprit = dist.get_world_size() - 1
    spoiled: list[Any] = ["mix.weight"]
    before: list[Any] = []
    step_now = [0]

    def bad_batch(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        bad = step_now[0] == BAD and where == "batch" and dist.get_rank() == culprit
        return tuple(x * value for x in inputs) if bad else inputs

    def before_step(step: int) -> None:
        step_now[0] = step + 1
        if step != BAD:
            return
        if where == "gradient":
            spoiled[0] = spoil(placed.model, value) if dist.get_rank() == culprit else None
            dist.broadcast_object_list(spoiled, src=culprit)
        before.append(held(placed.model, optimizer))

    placed.model.register_forward_pre_hook(bad_batch)
    steps = {"share": placed.share, "rate": RATE, "before_step": before_step}
    seen = train(placed.model, optimizer, range(BAD + 1), DTYPE, **steps)
    skipped, untouched = bool(optimizer.last_step_skipped), held(placed.model, optimizer) == before[0]
    seen += train(placed.model, optimizer, range(BAD + 1, END), DTYPE, **steps)
    expected, weights = spoiled_alone(spoiled[0], value, nonfinite)
    found = whole_weights(placed.model)
    pairs = [(a[name], b[name]) for a, b in zip(seen, expected, strict=True) for name in b]
    return {
        "skipped": skipped,
        "untouched": untouched,
        "skipped later": bool(optimizer.last_step_skipped),
        "bits": bits(seen),
        "betas": max(abs(a - b) for a, b in pairs),
        "bad step": max(abs(seen[BAD][name] - beta) for name, beta in expected[BAD].items()),
        "weights": max(float((found[name] - w).abs().max()) for name, w in weights.items()),
        "interior": sum(1e-6 < b < 0.88 for _, b in pairs) / len(pairs),
        "own": expected[BAD][spoiled[0]],
    }


# ---------------------------------------------------------------- a module without a batch
class Skipping(Net):
    """Skip the second block if ``skip`` is set."""

    skip = False

    def forward(self, x: Tensor) -> Tensor:
        blocks, self.blocks = self.blocks, nn.ModuleList(list(self.blocks)[: 1 if self.skip else 2])
        try:
            return super().forward(x)
        finally:
            self.blocks = blocks


def skipping() -> Skipping:
    net = Skipping().double()
    net.load_state_dict(make_net(DTYPE).state_dict())
    return net


def leaves_out(step: int, rank: int) -> bool:
    """Return whether to skip the block: rank 0 skips it in every third step, and all ranks in every fifth."""
    return step % 5 == 4 or (step % 3 == 1 and rank == 0)


def step_with(optimizer: AMAdamW, step: int, loss: Callable[[], Tensor], betas: list[dict[str, float]]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = RATE * (0.5 if step % 3 == 0 else 1.0)
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
    betas.append({name: float(beta) for name, beta in optimizer.momentum().items()})


def part_loss(model: nn.Module, net: Skipping, step: int, rank: int, world: int) -> Tensor:
    x, y = (part.chunk(world)[rank] for part in batch_of(step, DTYPE))
    net.skip = leaves_out(step, rank)
    return F.mse_loss(model(x), y)


def unused_module_under_ddp() -> dict[str, Any]:
    """Train with find_unused_parameters: some steps use the block on a part of the ranks, some on none."""
    rank, world = dist.get_rank(), dist.get_world_size()
    net = skipping()
    model = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = make_optimizer("adamw", groups_of(model), "tensor", replica_group=dist.group.WORLD)
    seen: list[dict[str, float]] = []
    for step in range(8):
        step_with(optimizer, step, lambda step=step: part_loss(model, net, step, rank, world), seen)

    single = skipping()
    alone = make_optimizer("adamw", groups_of(single), "tensor")
    expected: list[dict[str, float]] = []
    for step in range(8):
        step_with(
            alone,
            step,
            lambda step=step: torch.stack([part_loss(single, single, step, r, world) for r in range(world)]).mean(),
            expected,
        )
    pairs = [(a[name], b[name]) for a, b in zip(seen, expected, strict=True) for name in b]
    weights = dict(single.named_parameters())
    return {
        "bits": bits(seen),
        "betas": max(abs(a - b) for a, b in pairs),
        "weights": max(float((w - weights[name]).abs().max()) for name, w in net.named_parameters()),
        "steps": [float(optimizer.state[param]["step"]) for param in net.blocks[1].parameters()],
        "expected": [float(alone.state[param]["step"]) for param in single.blocks[1].parameters()],
        "interior": sum(1e-6 < b < 0.88 for _, b in pairs) / len(pairs),
    }


def gradients_missing_on_one_rank(layout: str) -> dict[str, Any]:
    """Remove gradients after backward: in one step on one rank, in the next on all."""
    placed = LAYOUTS[layout][0](DTYPE)
    optimizer = optimizer_of(placed, "adamw", "tensor")
    rank, culprit = dist.get_rank(), dist.get_world_size() - 1
    params = {strip_wrappers(name): param for name, param in placed.model.named_parameters()}
    lost = params["blocks.1.up.weight"]
    moved, counted = [], []

    def before_step(step: int) -> None:
        if (step == BAD and rank == culprit) or step == BAD + 1:
            lost.grad = None

    seen = []
    for step in range(END):
        before, count = local(lost.detach()).clone(), float(optimizer.state[lost]["step"]) if step else 0.0
        options = {"share": placed.share, "rate": RATE, "before_step": before_step}
        seen += train(placed.model, optimizer, range(step, step + 1), DTYPE, **options)
        moved.append(not torch.equal(before, local(lost.detach())))
        counted.append(float(optimizer.state[lost]["step"]) - count)
    return {"bits": bits(seen), "moved": moved, "counted": counted}


def step_left_out_by_one_rank() -> str:
    """Return the error of rank 0, whose sums rank 1 does not join because it skipped its step, as a GradScaler may."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    if dist.get_rank() > 1:
        return ""
    net = make_net(DTYPE)
    optimizer = AMAdamW(net.named_parameters(), replica_group=group)
    said = ""
    for step in range(2):
        for param in net.parameters():
            param.grad = torch.ones_like(param)
        if step == 0 or dist.get_rank() == 0:
            try:
                optimizer.step()
            except RuntimeError as error:
                said = str(error)
    return said
