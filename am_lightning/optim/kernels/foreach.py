"""The two passes over many tensors at once, without a host sync and without a launch for each tensor.

They serve accelerators without Triton, small tensors on a CPU without the C++ loop, and groups with ``foreach=True``.
Rows are processed in buckets of bounded size, and large rows in parts. Temporaries are therefore a few buckets (16 MiB
each in float32, 256 KiB on a CPU), not a few models. ``buckets`` explains why a bucket is copied into one matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from am_lightning.optim.kernels.buckets import Bucket, BucketPlan, Matrices, in_parts, key_of, part_of, plan_of
from am_lightning.optim.kernels.inputs import Coefficients, LocalShard, too_large
from am_lightning.optim.kernels.rounding import is_stochastic, seeds_of, stochastic_at
from am_lightning.optim.kernels.transfer import moved
from am_lightning.optim.kernels.workspace import Workspace

_READ = ("one_plus_k", "c_root", "c_eps")
_WRITTEN = ("omega", "lr", "decay_factor", "c_root", "c_eps")


class ForeachPasses:
    """Both passes over shards of any kind, which may be on several devices."""

    def __init__(self, shards: Sequence[LocalShard], workspace: Workspace) -> None:
        self._shards = shards
        device, matrices = shards[0].x.device, workspace.keep(Matrices)
        self._plan: BucketPlan = workspace.constants.made(
            key_of(shards), device, lambda: plan_of(shards, list(in_parts(shards)), matrices)
        )
        counts = Counter(owner for bucket in self._plan.buckets for owner, _ in bucket.members)
        self._split = frozenset(owner for owner, count in counts.items() if count > 1)

    def sums(self, coefficients: Coefficients, accumulate: torch.dtype) -> Tensor:
        """Run pass 1, which only reads. Returns N and D, ``[shards, 2]``.

        Sums are in the compute dtype within a block of at most 64 Ki elements, and in ``accumulate`` over blocks.
        """
        device = self._shards[0].x.device
        tables = _Tables(coefficients, _READ)
        partial = [torch.empty(2, 0, dtype=accumulate, device=device)]
        for bucket in self._plan.buckets:
            parts = self._parts(bucket)
            partial.append(moved(_sums(bucket, parts, tables), device, accumulate))
        return self._plan.over_blocks(torch.cat(partial, 1))

    def update(self, coefficients: Coefficients, active: Tensor) -> None:
        """Run pass 2, which writes d, v and x of the rows where ``active``, ``[rows]`` bool, is True."""
        tables = _Tables(coefficients, _WRITTEN)
        kept = {device: moved(active, device) for device in {shard.x.device for shard in self._shards}}
        for bucket in self._plan.buckets:
            parts = self._parts(bucket)
            _update(bucket, parts, tables, kept[parts[0].x.device].index_select(0, bucket.rows)[:, None])

    def _parts(self, bucket: Bucket) -> list[LocalShard]:
        shards, split = self._shards, self._split
        return [part_of(shards[i], first) if i in split else shards[i] for i, first in bucket.members]


class _Tables:
    """The coefficients of all rows, ``[rows, names]``, copied once to each device and dtype."""

    def __init__(self, coefficients: Coefficients, names: Sequence[str]) -> None:
        self.coefficients = coefficients
        self._names = [name for name in names if name in coefficients]
        self._made: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def of(self, bucket: Bucket, shard: LocalShard) -> dict[str, Tensor]:
        """Return the coefficients of a bucket by name, each ``[blocks, 1]``, in the compute dtype."""
        device, dtype = shard.x.device, shard.compute_dtype
        if (device, dtype) not in self._made:
            table = torch.stack([self.coefficients[name] for name in self._names], 1)
            self._made[device, dtype] = moved(table, device, dtype)
        chosen = self._made[device, dtype].index_select(0, bucket.rows)
        return {name: column[:, None] for name, column in zip(self._names, chosen.unbind(1), strict=True)}


def _sums(bucket: Bucket, parts: Sequence[LocalShard], tables: _Tables) -> Tensor:
    """Return N and D of each block, ``[2, blocks]``.

    N = sum (d - (1 + k) g) (d / P + mu x),  D = sum (d - g)^2 / (P q),  q = 1 + lambda P. D is nan if v' does not fit
    in its dtype.
    """
    o, n = parts[0].options, tables.of(bucket, parts[0])
    dtype = parts[0].compute_dtype
    g, d = _gradient(bucket, parts), bucket.pack("d", [p.d for p in parts]).to(dtype)
    diff, fits = torch.sub(d, g), None
    second = [p.v for p in parts if p.v is not None]
    if not second:
        weighted = torch.div(diff, 1 + o.lambd)
        slope = d.clone() if o.mu else d
    else:
        v = bucket.pack("v", second).to(dtype)
        fits = bucket.block_max(v.lerp_(g * g, 1 - o.beta2)) < too_large(second[0].dtype)
        precond = _precond(v, n)
        del v
        weighted = torch.addcmul(precond, precond, precond, value=o.lambd)  # P q
        weighted = torch.div(diff, weighted, out=weighted)
        slope = torch.div(d, precond, out=precond)
    den = bucket.block_sums(weighted.mul_(diff))
    if fits is not None:
        den.masked_fill_(~fits, torch.nan)
    del weighted
    if o.mu:
        slope.add_(bucket.pack("x", [p.x for p in parts]).to(dtype), alpha=o.mu)
    ahead = torch.addcmul(d, g, n["one_plus_k"], value=-1, out=diff)  # d - (1 + k) g
    return torch.stack([bucket.block_sums(ahead.mul_(slope)), den])


def _update(bucket: Bucket, parts: Sequence[LocalShard], tables: _Tables, keep: Tensor) -> None:
    """Write v', then d' = d + omega (g - d) / q, then x' = (1 - mu eta) x - eta d' / P."""
    o, n = parts[0].options, tables.of(bucket, parts[0])
    dtype = parts[0].compute_dtype
    g, d = _gradient(bucket, parts), bucket.pack("d", [p.d for p in parts])
    precond, second = None, [p.v for p in parts if p.v is not None]
    if second:
        v = bucket.pack("v", second)
        new_v = torch.lerp(v.to(dtype), g * g, 1 - o.beta2)
        _write(bucket, "v", second, v, new_v, keep)
        del v
        precond = _precond(new_v, n)
        del new_v
    work = d.to(dtype)
    move = g.sub_(work).mul_(n["omega"])
    move = move.div_(1 + o.lambd) if precond is None else move.div_(precond.mul(o.lambd).add_(1.0))
    move.add_(work)  # d'
    del work
    _write(bucket, "d", [p.d for p in parts], d, _rounded(bucket, parts[0], move, tables), keep)
    del d
    move = (move if precond is None else move.div_(precond)).mul_(n["lr"])
    x = bucket.pack("x", [p.x for p in parts])
    new_x = x.to(dtype)
    if o.mu:
        new_x = torch.mul(new_x, n["decay_factor"])
    _write(bucket, "x", [p.x for p in parts], x, torch.sub(new_x, move, out=move), keep)


def _gradient(bucket: Bucket, parts: Sequence[LocalShard]) -> Tensor:
    """Return a copy of g in the compute dtype, with ``maximize`` and coupled weight decay applied."""
    o, dtype = parts[0].options, parts[0].compute_dtype
    g = bucket.pack("g", [p.g for p in parts]).to(dtype)
    if o.maximize:
        g.neg_()
    if o.l2:
        g.add_(bucket.pack("x", [p.x for p in parts]).to(dtype), alpha=o.l2)
    return g


def _precond(v: Tensor, n: dict[str, Tensor]) -> Tensor:
    """Return P = c_t (sqrt(v' / (1 - beta2^t)) + eps), computed in place of v'."""
    return v.sqrt_().mul_(n["c_root"]).add_(n["c_eps"])


def _write(bucket: Bucket, name: str, targets: list[Tensor], old: Tensor, new: Tensor, keep: Tensor) -> None:
    """Write ``new`` into the targets where ``keep`` is True.

    ``old`` holds the values of the targets, packed under ``name``, and is overwritten. torch.where, not a product: NaN
    * 0 is NaN, and the other elements must not change by a bit.
    """
    torch.where(keep, new.to(old.dtype), old, out=old)
    bucket.unpack(name, old, targets)


def _rounded(bucket: Bucket, like: LocalShard, new: Tensor, tables: _Tables) -> Tensor:
    """Return d' after stochastic rounding, or unchanged if it is stored by a cast."""
    if not is_stochastic(like):
        return new
    steps = moved(tables.coefficients["step"], new.device, torch.int64).index_select(0, bucket.rows)
    return stochastic_at(new, seeds_of(steps, bucket.rows)[:, None], bucket.starts + bucket.first)
