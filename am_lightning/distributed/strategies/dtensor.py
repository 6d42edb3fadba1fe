"""The strategy of DTensors: FSDP2, HSDP, tensor parallel and any mix of them, on any mesh."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from am_lightning.distributed.shard import Groups, ShardInfo, TensorSlice, my_rank
from am_lightning.distributed.strategies.strategy import Cover, Strategy


class DTensorStrategy(Strategy):
    """A DTensor carries its mesh and placements."""

    name = "DTensor"

    def holds(self, param: Tensor) -> bool:
        return is_dtensor(param)

    def slices(self, param: Tensor, name: str, group_index: int) -> list[TensorSlice]:
        return [TensorSlice(name, shard_info_of(param, name))]

    @classmethod
    def cover(cls, shards: Sequence[ShardInfo]) -> Cover | None:
        if any(shard.mesh is None for shard in shards):
            return None
        found = span_of_root([shard.mesh for shard in shards])
        if found is None:
            return None
        ranks, mesh = found
        return ranks, lambda: mesh_groups(mesh)


def is_dtensor(tensor: object) -> bool:
    """Return whether ``tensor`` is a DTensor. If the module is not imported, no DTensor exists."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """Return this rank's elements of a tensor: a view of a DTensor's shard, or the tensor itself."""
    if not is_dtensor(tensor):
        return tensor  # type: ignore[no-any-return]
    with torch.no_grad():
        shard = tensor.to_local()
    wait = getattr(shard, "wait", None)  # an AsyncCollectiveTensor
    return shard if wait is None else wait()  # type: ignore[no-any-return]


def redistributed_grad(param: Tensor) -> Tensor:
    """Return ``param.grad`` placed like ``param``. Collective over the mesh dimensions whose placement differs.

    Tensor parallel leaves gradients of replicated norms as Partial sums.
    """
    grad = param.grad
    assert grad is not None
    if is_dtensor(param) and is_dtensor(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        return grad.redistribute(placements=param.placements)  # type: ignore[attr-defined, no-any-return]
    return grad


def placement_of(tensor: Any) -> tuple[Any, ...] | None:
    """Return placements and mesh of a DTensor, or None. Shards of DTensors hold the same elements if both are equal."""
    return (tuple(tensor.placements), tensor.device_mesh.mesh.tolist()) if is_dtensor(tensor) else None


def describe_placement(tensor: Any) -> str:
    """Return the placements and the ranks in the order of the mesh as text for messages."""
    if not is_dtensor(tensor):
        return "a plain tensor"
    ranks = tensor.device_mesh.mesh.flatten().tolist()
    listed = f"{', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''}"
    return f"a DTensor placed ({', '.join(map(str, tensor.placements))}) on the mesh of ranks {listed}"


def shard_info_of(param: Any, name: str) -> ShardInfo:
    """Return the ShardInfo of a DTensor.

    Raises:
        ValueError: if a placement neither splits nor copies, or this rank is not in the mesh.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    splits = (Shard, _StridedShard)  # the second is a subclass of the first in some releases only
    mesh, placements = param.device_mesh, tuple(param.placements)
    for placement in placements:
        if not isinstance(placement, (*splits, Replicate)):
            raise ValueError(
                f"parameter {name!r} is a DTensor placed as {placements}: {placement} holds a part of each element, so "
                "sums over elements cannot be formed. Redistribute it to Shard or Replicate before the optimizer is "
                "built"
            )
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(
            f"parameter {name!r} is a DTensor on a mesh of ranks {mesh.mesh.flatten().tolist()}, and this rank "
            f"is {my_rank()}. Give each rank's optimizer only parameters of meshes that the rank is in"
        )
    copies = zip(coordinate, placements, strict=True)
    is_owner = all(c == 0 or isinstance(p, splits) for c, p in copies)
    return ShardInfo(
        frozenset(mesh.mesh.flatten().tolist()),
        is_owner,
        lambda: mesh_groups(mesh),
        param.numel(),
        f"({', '.join(str(p) for p in placements)}) on {_mesh_description(mesh)}",
        mesh,
    )


def mesh_groups(mesh: Any) -> Groups:
    """Return a group of all ranks of ``mesh``: its own if it has one dimension, else the group of the flattened mesh.

    Flattening creates process groups once for a mesh. All ranks of the world do so together, at the first step.
    """
    return (mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group(),)


def span_of_root(meshes: Sequence[Any]) -> tuple[frozenset[int], Any] | None:
    """Return the ranks and the slice of the root mesh, in whole dimensions, that cover all of ``meshes``.

    Return None if no such slice exists, because there are several roots or a dimension was split.
    """
    root = _root_of(meshes[0])
    grid, names = root.mesh, root.mesh_dim_names
    if names is None or any(_root_of(mesh) != root for mesh in meshes[1:]):
        return None
    dims: set[int] = set()
    for mesh in meshes:
        ranks = mesh.mesh.flatten().tolist()
        where = torch.stack([(grid == rank).nonzero()[0] for rank in ranks])
        varies = [d for d in range(grid.ndim) if len(set(where[:, d].tolist())) > 1]
        size = 1
        for d in varies:
            size *= grid.shape[d]
        if size != len(ranks):
            return None
        dims.update(varies)
    cover = root[tuple(names[d] for d in sorted(dims))]
    return frozenset(cover.mesh.flatten().tolist()), cover


def _root_of(mesh: Any) -> Any:
    """Return the mesh that ``mesh`` was cut from, or itself. Before torch 2.10, a table of torch holds it."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    table = import_module("torch.distributed.device_mesh")._mesh_resources
    return table.get_root_mesh(mesh)


def _mesh_description(mesh: Any) -> str:
    names = mesh.mesh_dim_names or [f"dim {d}" for d in range(mesh.ndim)]
    return f"mesh ({', '.join(f'{n}={s}' for n, s in zip(names, mesh.mesh.shape, strict=True))})"
