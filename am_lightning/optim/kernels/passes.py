"""Chooses the kernels of a step: which rows go through which of the three tiers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from am_lightning.optim.kernels import blocked, foreach, reference
from am_lightning.optim.kernels.blocked import Scratch
from am_lightning.optim.kernels.pieces import Numbers, Piece, is_flat

REFERENCE, BLOCKED, FOREACH = "reference", "blocked", "foreach"


def tier(piece: Piece, use_foreach: bool | None) -> str:
    """``foreach=False`` is the reference, ``True`` torch._foreach_*; ``None`` the fastest eager tier for the device.

    The blocked tier walks the storage, so tensors whose strides differ go to the reference.
    """
    on_cpu = piece.x.device.type == "cpu"
    if use_foreach or (use_foreach is None and not on_cpu):
        return FOREACH
    if use_foreach is None and is_flat(piece.tensors()):
        return BLOCKED
    return REFERENCE


class Passes:
    """Both passes of one step over pieces that may need different tiers."""

    def __init__(self, pieces: Sequence[Piece], tiers: Sequence[str], scratch: Scratch) -> None:
        self._scratch = scratch
        self._by_tier: dict[tuple[str, str], list[Piece]] = {}
        for piece, name in zip(pieces, tiers, strict=True):
            self._by_tier.setdefault((name, piece.x.device.type), []).append(piece)

    def sums(self, numbers: Numbers, rows: int, device: torch.device, accumulate: torch.dtype) -> Tensor:
        """Pass 1: ``[rows, 2]``, N and D; zero for rows without a gradient here."""
        out: list[Tensor | None] = [None] * rows
        for (name, _), pieces in self._by_tier.items():
            if name == BLOCKED:
                pairs = blocked.sums(pieces, numbers, accumulate, self._scratch)
            elif name == FOREACH:
                pairs = foreach.sums(pieces, numbers, accumulate)
            else:
                pairs = reference.sums(pieces, numbers, accumulate)
            for piece, pair in zip(pieces, pairs, strict=True):
                out[piece.row] = pair.to(device, non_blocking=True)
        if not rows:  # a pipeline stage, or a rank, without parameters
            return torch.zeros(0, 2, dtype=accumulate, device=device)
        nothing = torch.zeros(2, dtype=accumulate, device=device)
        return torch.stack([nothing if pair is None else pair for pair in out])

    def update(self, numbers: Numbers, counts: Tensor) -> None:
        """Pass 2: write the rows where ``counts`` (``[rows]`` bool) is True.

        On the CPU this is read on the host, once; elsewhere nothing waits for the device.
        """
        host: list[bool] | None = None
        for (name, device_type), pieces in self._by_tier.items():
            if name == FOREACH or device_type != "cpu":
                kept = [counts[p.row].to(p.x.device, non_blocking=True) for p in pieces]
                (foreach if name == FOREACH else reference).update(pieces, numbers, kept)
                continue
            host = counts.tolist() if host is None else host
            pieces = [p for p in pieces if host[p.row]]
            if name == BLOCKED:
                blocked.update(pieces, numbers, self._scratch)
            else:
                reference.update(pieces, numbers, None)
