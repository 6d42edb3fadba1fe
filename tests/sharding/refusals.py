"""Functions that each rank runs: optimizers of layouts that cannot be summed, and their state after the refusal."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
from torch.distributed.tensor import DTensor, Partial, Placement, Shard

from am_lightning import AMSGD, AMAdamW
from am_lightning.distributed.strategies.dtensor import local
from tests.sharding.layouts import LAYOUTS, mesh, tensor_parallel
from tests.sharding.model import make_net
from tests.sharding.steps import optimizer_of

Named = list[tuple[str, Tensor]]
DTYPE = torch.float64


def attempt(case: str, **arguments: Any) -> dict[str, Any]:
    """Build an optimizer, make a step, and return the outcome: ``error`` is None if it succeeded."""
    optimizer, params = CASES[case](**arguments)
    before = [local(param).detach().clone() for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    error = text = None
    try:
        optimizer.step()
    except Exception as raised:
        error, text = type(raised).__name__, str(raised)
    same = all(torch.equal(local(p).detach(), b) for p, b in zip(params, before, strict=True))
    return {"error": error, "text": text, "moved": not same, "states": len(optimizer.state)}


def copies_named_late() -> dict[str, Any]:
    """Make two steps of a DDP-like optimizer without a replica group, with local gradients, and two with one."""
    optimizer, (param,) = over([("w", weight(3))])
    texts, described = [], []
    for step in range(4):
        if step == 2:
            optimizer.replica_group = dist.group.WORLD
        param.grad = torch.tensor([1.0, -2.0, 0.5], dtype=DTYPE) * (1 + dist.get_rank() + step)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        texts.append([str(warning.message) for warning in caught])
        described.append(optimizer.describe())
    return {"texts": texts, "described": described, "beta": float(optimizer.momentum()["w"])}


def over(named: Named, kind: str = "adamw", **options: Any) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    options = {"lr": 0.1, "scope": "tensor"} | options
    return (AMAdamW if kind == "adamw" else AMSGD)(named, **options), [param for _, param in named]


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, 0.5, dtype=DTYPE))


def from_local(
    piece: tuple[int, ...], placement: Placement, shape: tuple[int, ...] | None = None, ranks: int = 0
) -> nn.Parameter:
    """Make a DTensor on all ranks whose local shard has the shape ``piece`` and which claims the shape ``shape``."""
    whole = {} if shape is None else {"shape": torch.Size(shape), "stride": torch.empty(shape).stride()}
    world = mesh(dist.get_world_size())
    return nn.Parameter(
        DTensor.from_local(torch.ones(piece, dtype=DTYPE), world, [placement], run_check=False, **whole)
    )


def partial_parameter(scope: str) -> Any:
    return over([("fine", weight(3)), ("sums.weight", from_local((4, 2), Partial()))], scope=scope)


def pieces_do_not_add_up(scope: str) -> Any:
    """Claim 5 rows while each rank holds 2."""
    named = [("fine", from_local((2, 3), Shard(0))), ("short.weight", from_local((2, 3), Shard(0), (5, 3)))]
    return over(named, scope=scope)


def one_piece_too_large(scope: str) -> Any:
    """Give the last rank alone one row too many."""
    world, rank = dist.get_world_size(), dist.get_rank()
    rows = 3 if rank == world - 1 else 2
    named = [("fine", weight(3)), ("long.weight", from_local((rows, 3), Shard(0), (2 * world, 3)))]
    return over(named, scope=scope)


# ---------------------------------------------------------------- groups that do not fit
def replicas_inside_the_mesh(scope: str) -> Any:
    named = [("table.weight", from_local((2, 3), Shard(0))), ("plain", weight(3))]
    return over(named, scope=scope, replica_group=dist.group.WORLD)


def replicas_not_named(scope: str, kind: str) -> Any:
    """Use TP on one dimension and DDP on the other without naming the replicas."""
    placed = LAYOUTS["tp_ddp"][0](DTYPE)
    return over(list(placed.model.named_parameters()), kind, scope=scope)


def outside_of_the_mesh(scope: str) -> Any:
    """Use a mesh of the first two ranks; the other ranks get a DTensor without elements."""
    pair = DeviceMesh("cpu", [0, 1])
    piece = torch.ones(2 if dist.get_rank() < 2 else 0, 3, dtype=DTYPE)
    return over([("pair.weight", nn.Parameter(DTensor.from_local(piece, pair, [Shard(0)])))], scope=scope)


# ---------------------------------------------------------------- different models on the ranks
def odd_name(named: Named) -> Named:
    return [("odd.weight" if name == "mix.weight" else name, param) for name, param in named]


def odd_shape(named: Named) -> Named:
    return [(name, weight(7, 3) if name == "mix.weight" else param) for name, param in named]


def odd_count(named: Named) -> Named:
    return [*named, ("extra.weight", weight(2))]


def odd_order(named: Named) -> Named:
    return [*named[1:], named[0]]


DIFFERENCES = {"name": odd_name, "shape": odd_shape, "count": odd_count, "order": odd_order}


def other_models(what: str, odd_ranks: Sequence[int], scope: str) -> Any:
    """Claim copies of one model, while ``odd_ranks`` hold another."""
    named = list(make_net(DTYPE).named_parameters())
    if dist.get_rank() in odd_ranks:
        named = DIFFERENCES[what](named)
    return over(named, scope=scope, replica_group=dist.group.WORLD)


def other_groups(odd_ranks: Sequence[int], scope: str) -> Any:
    """Put the same tensors in the same order, with another boundary between the groups."""
    named = list(make_net(DTYPE).named_parameters())
    first = 3 if dist.get_rank() in odd_ranks else 5
    groups = [{"params": named[:first]}, {"params": named[first:]}]
    optimizer = AMAdamW(groups, lr=0.1, scope=scope, replica_group=dist.group.WORLD)
    return optimizer, [param for _, param in named]


def other_sharded_models(what: str, odd_ranks: Sequence[int], scope: str) -> Any:
    """Use FSDP2 while some ranks hold one more plain tensor, or hold it at another position."""
    named = list(LAYOUTS["fsdp2"][0](DTYPE).model.named_parameters())
    if dist.get_rank() in odd_ranks:
        named = DIFFERENCES[what](named)
    return over(named, scope=scope)


# ---------------------------------------------------------------- FSDP1
def flat_parameters(scope: str, kind: str, layout: str = "fsdp1_flat", bind: bool = True) -> Any:
    placed = LAYOUTS[layout][0](DTYPE)
    placed.bind = bind
    return optimizer_of(placed, kind, scope), list(placed.model.parameters())


def fsdp1_over_tensor_parallel(scope: str, original: bool, bind: bool) -> Any:
    grid = mesh(2, 2)
    net = tensor_parallel(make_net(DTYPE), grid["tp"])
    model = FSDP(net, device_mesh=grid["dp"], use_orig_params=original, device_id=torch.device("cpu"))
    optimizer, params = over(list(model.named_parameters()), scope=scope)
    if bind:
        optimizer.bind_model(model)
    return optimizer, params


CASES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        partial_parameter,
        pieces_do_not_add_up,
        one_piece_too_large,
        replicas_inside_the_mesh,
        replicas_not_named,
        outside_of_the_mesh,
        other_models,
        other_groups,
        other_sharded_models,
        flat_parameters,
        fsdp1_over_tensor_parallel,
    )
}


def not_a_member() -> tuple[str, str] | None:
    """Give the optimizer of every rank a group of the first two ranks."""
    group = dist.new_group([0, 1])
    try:
        AMAdamW([weight(3)], replica_group=group)
    except TypeError as error:
        return type(error).__name__, str(error)
    return None
