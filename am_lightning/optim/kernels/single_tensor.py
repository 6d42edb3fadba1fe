"""The two passes as plain formulas, one tensor at a time. Other kernels are compared with this one.

Large tensors are processed in parts, so that the temporaries are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from am_lightning.optim.kernels.buckets import in_parts
from am_lightning.optim.kernels.inputs import Coefficients, LocalShard, on_device, on_host, too_large
from am_lightning.optim.kernels.rounding import is_stochastic, seed_of, stochastic_in_parts
from am_lightning.optim.kernels.transfer import moved
from am_lightning.optim.kernels.workspace import Workspace


class _Rows:
    """The coefficients of single rows: floats on the CPU, 0-dim tensors of the compute dtype on other devices."""

    def __init__(self, coefficients: Coefficients) -> None:
        self._coefficients = coefficients
        self._columns: dict[torch.device, dict[str, Any]] = {}

    def of(self, shard: LocalShard) -> dict[str, Any]:
        """Return the coefficients of the shard's row by name."""
        device, on_cpu = shard.x.device, shard.x.device.type == "cpu"
        if device not in self._columns:
            there = on_host(self._coefficients) if on_cpu else on_device(self._coefficients, device)
            self._columns[device] = dict(there)
        row = {name: column[shard.row] for name, column in self._columns[device].items()}
        return row if on_cpu else {name: number.to(shard.compute_dtype) for name, number in row.items()}


class SingleTensorPasses:
    """Both passes, one shard after the other."""

    def __init__(self, shards: Sequence[LocalShard], workspace: Workspace | None = None) -> None:
        self._shards = shards

    def sums(self, coefficients: Coefficients, accumulate: torch.dtype) -> Tensor:
        """Run pass 1, which only reads. Returns N and D, ``[shards, 2]``.

        N = sum (d - (1 + k) g) (d / P + mu x),  D = sum (d - g)^2 / (P q),  q = 1 + lambda P. D is nan if v' does not
        fit in its dtype. Otherwise finite gradients whose square overflows would not show in the sums, because the sums
        are divided by P.
        """
        device, rows = self._shards[0].x.device, _Rows(coefficients)
        of_shards = [
            torch.stack([_sums(part, rows, accumulate) for _, part in in_parts([s])]).sum(0) for s in self._shards
        ]
        return torch.stack([moved(pair, device) for pair in of_shards])

    def update(self, coefficients: Coefficients, active: Tensor) -> None:
        """Run pass 2, which writes d' = d + omega (g - d) / q,  x' = (1 - mu eta) x - eta d' / P  and v'.

        For shards on the CPU the host reads ``active`` once. Otherwise nothing waits for the device.
        """
        rows = _Rows(coefficients)
        host = active.tolist() if self._shards[0].x.device.type == "cpu" else None
        for _, part in in_parts(self._shards):
            if host is None:
                _update(part, rows, moved(active[part.row], part.x.device))
            elif host[part.row]:
                _update(part, rows, None)


def _sums(shard: LocalShard, rows: _Rows, accumulate: torch.dtype) -> Tensor:
    """Return N and D of a shard, ``[2]``."""
    c = rows.of(shard)
    g, d, x = _operands(shard)
    v, precond = _precond(shard, g, c)
    q = 1 + shard.options.lambd * precond
    slope = d / precond + shard.options.mu * x
    num = ((d - c["one_plus_k"] * g) * slope).sum(dtype=accumulate)
    den = ((d - g) * ((d - g) / (precond * q))).sum(dtype=accumulate)
    if v is not None and shard.v is not None:
        den = torch.where((v < too_large(shard.v.dtype)).all(), den, torch.nan)
    return torch.stack([num, den])


def _update(shard: LocalShard, rows: _Rows, active: Tensor | None) -> None:
    """Write d', v' and x' of a shard if ``active``, a 0-dim bool, is True or None."""
    c = rows.of(shard)
    g, d, x = _operands(shard)
    v, precond = _precond(shard, g, c)
    q = 1 + shard.options.lambd * precond
    d = d + c["omega"] * (g - d) / q
    x = c["decay_factor"] * x - c["lr"] * d / precond
    if is_stochastic(shard):
        d = stochastic_in_parts(d, seed_of(torch.as_tensor(c["step"], device=d.device), shard.row), shard.first)
    for old, new in ((shard.d, d), (shard.v, v), (shard.x, x)):
        if old is not None and new is not None:
            new = new.to(old.dtype)
            old.copy_(new if active is None else torch.where(active, new, old))


def _operands(shard: LocalShard) -> tuple[Tensor, Tensor, Tensor]:
    """Return g, d and x in the compute dtype, with ``maximize`` and coupled weight decay applied to g."""
    dtype = shard.compute_dtype
    g, d, x = shard.g.to(dtype), shard.d.to(dtype), shard.x.to(dtype)
    if shard.options.maximize:
        g = -g
    if shard.options.l2:
        g = g + shard.options.l2 * x
    return g, d, x


def _precond(shard: LocalShard, g: Tensor, c: dict[str, Any]) -> tuple[Tensor | None, Tensor | float]:
    """Return v' and P = c (sqrt(v' / (1 - beta2^t)) + eps), or None and 1 without a second moment."""
    if shard.v is None:
        return None, 1.0
    v = torch.lerp(shard.v.to(g.dtype), g * g, 1 - shard.options.beta2)
    return v, c["c_root"] * v.sqrt() + c["c_eps"]
