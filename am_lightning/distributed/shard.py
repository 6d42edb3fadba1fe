"""The placement of a logical tensor: the ranks that hold a part or a copy, and the copy that counts in sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

Groups = tuple[Any, ...]  # process groups; an all-reduce over each in turn sums over their product


@dataclass(frozen=True, eq=False)
class ShardInfo:
    """The placement of one logical tensor among the ranks.

    Attributes:
        ranks: all ranks that hold a part or a copy, as far as the tensor's own mesh or group tells.
        is_owner: whether this rank's part is the one that counts among the copies within ``ranks``.
        groups: function that returns the process groups whose product is ``ranks``. It is called on demand, because
            creating a group is collective.
        numel: number of elements of the whole tensor. None: unknown.
        description: description of the placement for messages.
        mesh: DeviceMesh of a DTensor. Default: None.
    """

    ranks: frozenset[int]
    is_owner: bool
    groups: Callable[[], Groups]
    numel: int | None
    description: str
    mesh: Any = None


@dataclass(frozen=True, eq=False)
class TensorSlice:
    """A logical tensor within one of the optimizer's parameters.

    Attributes:
        name: name of the tensor, if it shares the parameter with others.
        shard: placement of its elements among the ranks.
        span: its elements in this rank's part of the parameter, empty if other ranks hold them. None: all elements.
    """

    name: str
    shard: ShardInfo
    span: slice | None = None


def world_size() -> int:
    """Return the number of ranks of the default process group, or 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def my_rank() -> int:
    """Return this process's global rank, or 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def ranks_of(group: Any) -> frozenset[int]:
    """Return the global ranks of a process group."""
    return frozenset(dist.get_process_group_ranks(group))


def smallest_groups(ranks: frozenset[int], groups: Callable[[], Groups]) -> Groups:
    """Return no group for a single rank, the default group for all ranks, and ``groups()`` otherwise."""
    if len(ranks) == 1:
        return ()
    if len(ranks) == world_size():
        return (dist.group.WORLD,)
    return groups()


def shown(ranks: Sequence[int] | frozenset[int]) -> str:
    """Return ranks as text for a message: ``0, 1, 2, ... 63``."""
    listed = [str(rank) for rank in sorted(ranks)]
    return ", ".join(listed if len(listed) <= 8 else [*listed[:3], "...", listed[-1]])


def backend_device(group: Any, device: torch.device) -> torch.device:
    """Return ``device``, or the accelerator if the group's backend does not support ``device``."""
    config = dist.get_backend_config(group)  # "cpu:gloo,cuda:nccl"
    served = [entry.partition(":")[0] for entry in config.split(",")]
    if device.type in served or not torch.accelerator.is_available():
        return device
    here = torch.accelerator.current_accelerator()
    if here is None or here.type not in served:
        return device
    return torch.device(here.type, torch.accelerator.current_device_index())
