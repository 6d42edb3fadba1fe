"""Every placement of the model over ranks that the package supports: ``LAYOUTS[name](dtype) -> Placed``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from tests.device import DEVICE, ON_GPU
from tests.sharding import model
from tests.sharding.model import Block, Net


@dataclass
class Placed:
    """A model over the ranks, its share of the data, and what the optimizer needs to know."""

    model: nn.Module
    share: tuple[int, int]
    options: dict[str, Any] = field(default_factory=dict)  # options of the optimizer
    bind: bool = False  # FSDP1: bind the model to the optimizer
    collectives: int = 1  # per step, for the sums
    partial: int = 0  # number of gradients that each step redistributes
    scopes: tuple[str, ...] = ("tensor", "global")


def make_net(dtype: torch.dtype) -> Net:
    return model.make_net(dtype).to(DEVICE)


@functools.cache
def mesh(*shape: int, names: tuple[str, ...] = ("dp", "tp", "x")) -> DeviceMesh:
    return init_device_mesh(DEVICE.type, shape, mesh_dim_names=names[: len(shape)])


def spread(full: torch.Tensor, over: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Make a DTensor of a tensor that every rank has, without the communication of torch 2.6's distribute_tensor."""
    copies = DTensor.from_local(full.clone(), over, [Replicate()] * over.ndim, run_check=False)
    return copies.redistribute(over, placements)


def everyone() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def shard(net: Net, **options: Any) -> Net:
    for block in net.blocks:
        fully_shard(block, **options)
    fully_shard(net, **options)
    return net


def tensor_parallel(net: Net, tp: DeviceMesh, *, sequence: bool = False) -> Net:
    """Split blocks by columns and rows. With ``sequence``, norms see a part of the tokens: Partial gradients."""
    for block in net.blocks:
        plan: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        if sequence:
            plan["norm"] = SequenceParallel(use_local_output=True)
            plan["up"] = ColwiseParallel(input_layouts=Shard(1))
        parallelize_module(block, tp, plan)
        if sequence:
            block.norm.register_forward_pre_hook(functools.partial(split_tokens, tp=tp), prepend=True)
    return net


def split_tokens(module: nn.Module, arguments: tuple[Any, ...], *, tp: DeviceMesh) -> Any:
    """Return this rank's tokens of an input that all ranks have."""
    return (DTensor.from_local(arguments[0], tp, [Replicate()]).redistribute(tp, [Shard(1)]),)


def fsdp2(dtype: torch.dtype) -> Placed:
    return Placed(shard(make_net(dtype), mesh=mesh(dist.get_world_size())), everyone())


def fsdp2_without_mesh(dtype: torch.dtype) -> Placed:
    """Call fully_shard without a mesh, so that each call makes an equal mesh of its own."""
    return Placed(shard(make_net(dtype)), everyone())


def fsdp2_ignored(dtype: torch.dtype) -> Placed:
    """Ignore some parameters: they stay whole on each rank, and the user averages their gradients."""
    net = make_net(dtype)
    ignored = {net.gain, net.norm.weight, net.norm.bias, net.mix.weight}
    for block in net.blocks:
        fully_shard(block, mesh=mesh(dist.get_world_size()))
    fully_shard(net, mesh=mesh(dist.get_world_size()), ignored_params=ignored)
    for param in ignored:
        param.register_post_accumulate_grad_hook(average_gradient)
    return Placed(net, everyone())


def average_gradient(param: torch.Tensor) -> None:
    dist.all_reduce(param.grad)
    param.grad /= dist.get_world_size()


def hsdp(dtype: torch.dtype) -> Placed:
    side = math.isqrt(dist.get_world_size())
    return Placed(shard(make_net(dtype), mesh=mesh(side, side, names=("replicate", "shard"))), everyone())


def tp(dtype: torch.dtype) -> Placed:
    """Use tensor parallelism; norms and all that the plan does not name stay plain."""
    return Placed(tensor_parallel(make_net(dtype), mesh(dist.get_world_size(), names=("tp",))), (0, 1))


def tp_sequence(dtype: torch.dtype) -> Placed:
    tp_mesh = mesh(dist.get_world_size(), names=("tp",))
    net = tensor_parallel(make_net(dtype), tp_mesh, sequence=True)
    return Placed(net, (0, 1), partial=2 * len(net.blocks))  # weight and bias of each block's norm


def fsdp2_tp(dtype: torch.dtype) -> Placed:
    """Combine both: row-wise weights are (_StridedShard, Shard) on two dimensions, norms DTensors on the first."""
    grid = mesh(2, 2)
    net = shard(tensor_parallel(make_net(dtype), grid["tp"]), mesh=grid["dp"])
    return Placed(net, (grid["dp"].get_local_rank(), 2))


def fsdp2_tp_sequence(dtype: torch.dtype) -> Placed:
    grid = mesh(2, 2)
    net = shard(tensor_parallel(make_net(dtype), grid["tp"], sequence=True), mesh=grid["dp"])
    return Placed(net, (grid["dp"].get_local_rank(), 2))


def fsdp2_beside_tp(dtype: torch.dtype) -> Placed:
    """Shard blocks by TP only and the rest by FSDP only: no parameter is on the whole mesh, yet one sum is enough."""
    grid = mesh(2, 2)
    net = tensor_parallel(make_net(dtype), grid["tp"])
    inside = {param for block in net.blocks for param in block.parameters()}
    fully_shard(net, mesh=grid["dp"], ignored_params=inside)
    dp = grid["dp"].get_group()
    for param in inside:
        param.register_post_accumulate_grad_hook(functools.partial(average_over, group=dp))
    return Placed(net, (grid["dp"].get_local_rank(), 2))


def average_over(param: torch.Tensor, group: Any) -> None:
    local = param.grad.to_local() if hasattr(param.grad, "to_local") else param.grad
    dist.all_reduce(local, group=group)
    local /= dist.get_world_size(group)


def hsdp_tp(dtype: torch.dtype) -> Placed:
    grid = mesh(2, 1, 2, names=("replicate", "shard", "tp"))
    net = shard(tensor_parallel(make_net(dtype), grid["tp"]), mesh=grid["replicate", "shard"])
    return Placed(net, (grid["replicate"].get_local_rank(), 2))


def fsdp2_merged_mesh(dtype: torch.dtype) -> Placed:
    """Call fully_shard on a mesh that was flattened from two dimensions, as with context parallelism."""
    grid = mesh(2, 2, names=("dp", "cp"))
    return Placed(shard(make_net(dtype), mesh=grid["dp", "cp"]._flatten("dp_cp")), everyone())


def views_of_world(dtype: torch.dtype) -> Placed:
    """Make all meshes views of one flat root, as in current torchtitan, so that the root has no useful dimensions."""
    world = mesh(4, names=("world",))
    grid = split_world(world)
    net = shard(tensor_parallel(make_net(dtype), grid["tp"]), mesh=grid["fsdp"])
    return Placed(net, (grid["fsdp"].get_local_rank(), 2))


@functools.cache
def split_world(world: DeviceMesh) -> DeviceMesh:
    return world._unflatten(0, (2, 2), ("fsdp", "tp"))


def two_roots(dtype: torch.dtype) -> Placed:
    """Put the experts on a mesh of their own: two roots, one set of ranks."""
    net = make_net(dtype)
    other = mesh(2, 2, names=("edp", "ep"))
    fully_shard(net.blocks[0], mesh=other)
    fully_shard(net, mesh=mesh(4, names=("dp",)))
    return Placed(net, everyone())


def tp_ddp(dtype: torch.dtype) -> Placed:
    """Use TP on one dimension, and replicas on the other, which no placement mentions."""
    grid = mesh(2, 2)
    net = tensor_parallel(make_net(dtype), grid["tp"])
    for param in net.parameters():
        param.register_post_accumulate_grad_hook(functools.partial(average_over, group=grid["dp"].get_group()))
    return Placed(net, (grid["dp"].get_local_rank(), 2), {"replica_group": grid["dp"].get_group()})


def fsdp1(
    strategy: str = "FULL_SHARD", *, original: bool = True, bind: bool = True, ignored: bool = False
) -> Callable[[torch.dtype], Placed]:
    def build(dtype: torch.dtype) -> Placed:
        net = make_net(dtype)
        options: dict[str, Any] = {"process_group": _hybrid_groups()} if "HYBRID" in strategy else {}
        if ignored:
            options["ignored_states"] = [net.gain, net.mix.weight]
            for param in options["ignored_states"]:
                param.register_post_accumulate_grad_hook(average_gradient)
        model = FSDP(
            net,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            sharding_strategy=ShardingStrategy[strategy],
            use_orig_params=original,
            device_id=torch.accelerator.current_device_index() if ON_GPU else DEVICE,
            **options,
        )
        scopes = ("tensor", "global") if original else ("global",)
        return Placed(model, everyone(), bind=bind, scopes=scopes)

    return build


@functools.cache
def _hybrid_groups() -> tuple[Any, Any]:
    """Return this rank's groups (shards, replicas) of 2 x 2."""
    grid = mesh(2, 2, names=("node", "local"))
    return grid["local"].get_group(), grid["node"].get_group()


def ddp(dtype: torch.dtype) -> Placed:
    return Placed(DistributedDataParallel(make_net(dtype)), everyone(), {"replica_group": dist.group.WORLD})


# name -> (builder, worlds)
LAYOUTS: dict[str, tuple[Callable[[torch.dtype], Placed], tuple[int, ...]]] = {
    "ddp": (ddp, (2, 4)),
    "fsdp2": (fsdp2, (2, 4)),
    "fsdp2_without_mesh": (fsdp2_without_mesh, (2, 4)),
    "fsdp2_ignored": (fsdp2_ignored, (2, 4)),
    "fsdp2_merged_mesh": (fsdp2_merged_mesh, (4,)),
    "hsdp": (hsdp, (4,)),
    "tp": (tp, (2, 4)),
    "tp_sequence": (tp_sequence, (2, 4)),
    "tp_ddp": (tp_ddp, (4,)),
    "fsdp2_tp": (fsdp2_tp, (4,)),
    "fsdp2_tp_sequence": (fsdp2_tp_sequence, (4,)),
    "fsdp2_beside_tp": (fsdp2_beside_tp, (4,)),
    "hsdp_tp": (hsdp_tp, (4,)),
    "views_of_world": (views_of_world, (4,)),
    "two_roots": (two_roots, (4,)),
    "fsdp1_full": (fsdp1(), (2, 4)),
    "fsdp1_grad_op": (fsdp1("SHARD_GRAD_OP"), (2, 4)),
    "fsdp1_no_shard": (fsdp1("NO_SHARD"), (2, 4)),
    "fsdp1_hybrid": (fsdp1("HYBRID_SHARD"), (4,)),
    "fsdp1_ignored": (fsdp1(ignored=True), (2, 4)),
    "fsdp1_flat": (fsdp1(original=False), (2, 4)),
    "fsdp1_flat_grad_op": (fsdp1("SHARD_GRAD_OP", original=False), (2, 4)),
    "fsdp1_flat_no_shard": (fsdp1("NO_SHARD", original=False), (2, 4)),
    "fsdp1_flat_hybrid": (fsdp1("HYBRID_SHARD", original=False), (4,)),
    "fsdp1_unbound": (fsdp1(bind=False), (2, 4)),
    "fsdp1_unbound_hybrid": (fsdp1("HYBRID_SHARD", bind=False), (4,)),
    "fsdp1_unbound_no_shard": (fsdp1("NO_SHARD", bind=False), (2, 4)),
}
