"""Where one logical tensor lives: which ranks hold a part or a copy of it, and which of the copies counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

Groups = tuple[Any, ...]  # process groups; an all-reduce over each in turn sums over their product


@dataclass(frozen=True, eq=False)
class ShardInfo:
    """One logical tensor among the ranks.

    Attributes:
        ranks: all that hold a part or a copy, as far as this tensor's own mesh or group tells.
        is_owner: this rank's part is the one that counts among the copies within ``ranks``.
        groups: gives the process groups whose product is ``ranks``; creating one is collective, so only on demand.
        numel: elements of the whole tensor; None where that is not known here.
        description: the placement, for messages.
        mesh: the DTensor's DeviceMesh.
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
        name: its own, where it shares the parameter with others.
        shard: where its elements live among the ranks.
        span: its elements in this rank's part of the parameter, empty where they are elsewhere; None: all of them.
    """

    name: str
    shard: ShardInfo
    span: slice | None = None


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def my_rank() -> int:
    """This process's global rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def ranks_of(group: Any) -> frozenset[int]:
    """Global ranks of a process group."""
    return frozenset(dist.get_process_group_ranks(group))


def smallest_groups(ranks: frozenset[int], groups: Callable[[], Groups]) -> Groups:
    """No group where one rank is all, the default group where it serves, else ``groups()``."""
    if len(ranks) == 1:
        return ()
    if len(ranks) == world_size():
        return (dist.group.WORLD,)
    return groups()


def shown(ranks: Sequence[int] | frozenset[int]) -> str:
    """``0, 1, 2, ... 63``: ranks for a message."""
    listed = [str(rank) for rank in sorted(ranks)]
    return ", ".join(listed if len(listed) <= 8 else [*listed[:3], "...", listed[-1]])


def backend_device(group: Any, device: torch.device) -> torch.device:
    """``device``, or the accelerator where the group's backend serves only that."""
    config = dist.get_backend_config(group)  # "cpu:gloo,cuda:nccl"
    served = [entry.partition(":")[0] for entry in config.split(",")]
    if device.type in served or not torch.accelerator.is_available():
        return device
    here = torch.accelerator.current_accelerator()
    if here is None or here.type not in served:
        return device
    return torch.device(here.type, torch.accelerator.current_device_index())
