"""Check once, at the first step, that ranks that sum together hold the same tensors and that shards add up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from am_lightning.distributed.shard import Groups, backend_device, my_rank, ranks_of, shown
from am_lightning.distributed.strategies import LogicalParam, local

_PRIME = 2**61 - 1  # checksums are modulo this prime, so that they fit int64


def check_agreement(params: Sequence[LogicalParam], numels: Sequence[int], groups: Groups) -> None:
    """Check the tensors of one reduction. Collective over ``groups``.

    The check is one gather of three integers for each group. Only an error needs more, to name the tensor.

    Args:
        params: logical tensors of the reduction.
        numels: number of elements of each tensor that this rank counts.
        groups: process groups of the reduction.

    Raises:
        ValueError: on every rank, if ranks hold different tensors or the shards do not add up.
    """
    device = local(params[0].param).device
    digests = [_number((logical.name, logical.shard.numel, logical.group_index)) for logical in params]
    names = _number(digests)
    known = [i for i, logical in enumerate(params) if logical.shard.numel is not None]
    weights = [1 + _number(i) for i in known]
    mine = sum(numels[i] * w for i, w in zip(known, weights, strict=True)) % _PRIME
    expected = sum((params[i].shard.numel or 0) * w for i, w in zip(known, weights, strict=True)) % _PRIME
    total, alike = mine, True
    for group in groups:
        found = _gathered(torch.tensor([names, total, int(alike)], device=device), group).tolist()
        total = sum(entry[1] for entry in found) % _PRIME
        alike = all(entry[0] == names and entry[2] for entry in found)
    if not alike:
        _raise_for_tensors(params, digests, groups, device)
    if total != expected:
        _raise_for_shards(params, numels, groups, device)


def check_stages(description: str, group: object, device: torch.device) -> None:
    """Check that ``description`` is the same on all stages of a pipeline. Collective over its ``group``.

    Raises:
        ValueError: on every rank of the group, if it is not.
    """
    found = _gathered(torch.tensor([_number(description)], device=device), group)
    if bool((found != found[0]).any()):
        raise ValueError(
            f"the pipeline's stages do not fit together: rank {my_rank()} has {description}, another rank does not. "
            "Build every stage's optimizer with the same scope and number of parameter groups, empty where a stage has "
            "nothing"
        )


def _raise_for_tensors(
    params: Sequence[LogicalParam], digests: list[int], groups: Groups, device: torch.device
) -> None:
    """Raise an error that names the first tensor that differs, or the first that some ranks lack."""
    length = torch.tensor([len(params)], device=device)
    for group in groups:
        length = _gathered(length, group).amin(0)
    low = high = torch.tensor(digests[: int(length)], dtype=torch.int64, device=device)
    for group in groups:
        low, high = _gathered(low, group).amin(0), _gathered(high, group).amax(0)
    differing = [*(low != high).nonzero().flatten().tolist(), int(length)]
    position, count = differing[0], len(params)
    if position < count:
        here = f"tensor {position} of {count} is {_shown_param(params[position])}, unlike on others"
    else:
        here = f"there are {count} tensors, fewer than on others"
    raise ValueError(
        f"ranks {_shown_ranks(groups)} do not hold the same model: on rank {my_rank()} {here}. Build the optimizer "
        "from the same parameters in the same order and groups on all of them, and give replica_group only ranks that "
        "hold copies of one model"
    )


def _shown_ranks(groups: Groups) -> str:
    return shown(frozenset[int]().union(*(ranks_of(group) for group in groups)))


def _shown_param(logical: LogicalParam) -> str:
    size = "" if logical.shard.numel is None else f" with {logical.shard.numel} elements"
    return f"{logical.name!r}{size} in group {logical.group_index}"


def _raise_for_shards(
    params: Sequence[LogicalParam], numels: Sequence[int], groups: Groups, device: torch.device
) -> None:
    totals = torch.tensor(numels, device=device)
    for group in groups:
        totals = _gathered(totals, group).sum(0)
    for logical, found in zip(params, totals.tolist(), strict=True):
        if logical.shard.numel not in (None, found):
            raise ValueError(
                f"parameter {logical.name!r}, placed as {logical.shard.description}, has {logical.shard.numel} "
                f"elements, but the shards on ranks {_shown_ranks(groups)} have {found}: sums over it would be wrong. "
                "Shard the model before the optimizer is built, and leave its shards alone afterwards"
            )


def _gathered(vector: Tensor, group: object) -> Tensor:
    """Return every rank's vector as ``[ranks, n]``."""
    there = vector.to(backend_device(group, vector.device))
    parts = [torch.empty_like(there) for _ in range(dist.get_world_size(group))]  # type: ignore[arg-type]
    dist.all_gather(parts, there, group=group)
    return torch.stack(parts).to(vector.device)


def _number(value: object) -> int:
    """Return a 56-bit hash of ``value`` that is the same on every rank."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")
