"""Once, at the first step: do the ranks that will sum together hold the same rows, and do the pieces add up?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from am_lightning.sharding.dtensor import local
from am_lightning.sharding.home import Groups, Row, served_device, shown

_PRIME = 2**61 - 1  # checksums are modulo this: they fit int64


def check_agreement(rows: Sequence[Row], held: Sequence[int], groups: Groups, ranks: frozenset[int]) -> None:
    """Collective over ``groups``: one gather of two integers; another only to name what is wrong.

    Args:
        rows: those of one reduction.
        held: elements of this rank's counted pieces.

    Raises:
        ValueError: other tensors on other ranks, or pieces that do not add up; on every rank alike.
    """
    device = local(rows[0].param).device
    names = int.from_bytes(_digest([(row.name, row.home.numel) for row in rows])[:7], "big")
    known = [i for i, row in enumerate(rows) if row.home.numel is not None]
    weights = [1 + int.from_bytes(_digest(i)[:7], "big") for i in known]
    mine = sum(held[i] * w for i, w in zip(known, weights, strict=True)) % _PRIME
    expected = sum((rows[i].home.numel or 0) * w for i, w in zip(known, weights, strict=True)) % _PRIME
    total, alike = mine, True
    for group in groups:
        found = _gathered(torch.tensor([names, total, int(alike)], device=device), group).tolist()
        total = sum(entry[1] for entry in found) % _PRIME
        alike = all(entry[0] == names and entry[2] for entry in found)
    if not alike:
        raise ValueError(
            f"the ranks {shown(ranks)} do not hold the same model: other tensors, names or sizes than the {len(rows)} "
            "on this rank, or in another order. Build the optimizer from the same parameters on all of them, and give "
            "replica_group only ranks that hold copies of one model"
        )
    if total != expected:
        _raise_for_pieces(rows, held, groups, ranks, device)


def _raise_for_pieces(
    rows: Sequence[Row], held: Sequence[int], groups: Groups, ranks: frozenset[int], device: torch.device
) -> None:
    totals = torch.tensor(held, device=device)
    for group in groups:
        totals = _gathered(totals, group).sum(0)
    for row, found in zip(rows, totals.tolist(), strict=True):
        if row.home.numel not in (None, found):
            raise ValueError(
                f"parameter {row.name!r}, placed as {row.home.words}, has {row.home.numel} elements, but the pieces on "
                f"ranks {shown(ranks)} have {found}: sums over it would be wrong. Shard the model before the optimizer "
                "is built, and leave its shards alone afterwards"
            )


def _gathered(vector: Tensor, group: object) -> Tensor:
    """``[ranks, n]``: every rank's vector."""
    there = vector.to(served_device(group, vector.device))
    parts = [torch.empty_like(there) for _ in range(dist.get_world_size(group))]  # type: ignore[arg-type]
    dist.all_gather(parts, there, group=group)
    return torch.stack(parts).to(vector.device)


def _digest(value: object) -> bytes:
    return hashlib.sha256(repr(value).encode()).digest()
