"""The two passes with torch._foreach_*, for accelerators: no host sync, no Python branch on a tensor.

Rows are taken in buckets of bounded size, large ones in parts, so that the temporaries are at most a few buckets (of
64 MiB in float32), not a few models or a few embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from am_lightning.optim.kernels.pieces import Numbers, Piece, Scalar, flat, is_flat
from am_lightning.optim.kernels.rounding import is_stochastic, seed_of, stochastic

_BUCKET_ELEMENTS = 16 << 20


def sums(pieces: Sequence[Piece], numbers: Numbers, accumulate: torch.dtype) -> list[Tensor]:
    """Pass 1, which only reads: ``[2]`` with N and D for each piece."""
    parts: list[Tensor] = []
    for bucket in _buckets(_in_parts(pieces)):
        parts += _sums(bucket, numbers.on(bucket[0].x.device), accumulate)
    if len(parts) == len(pieces):
        return parts
    ends = iter(parts)
    return [torch.stack([next(ends) for _ in range(_count(piece))]).sum(0) for piece in pieces]


def update(pieces: Sequence[Piece], numbers: Numbers, keep: Sequence[Tensor]) -> None:
    """Pass 2, which writes d, v and x where ``keep`` (a 0-dim bool for each piece) is True."""
    keep = [kept for piece, kept in zip(pieces, keep, strict=True) for _ in range(_count(piece))]
    done = 0
    for bucket in _buckets(_in_parts(pieces)):
        _update(bucket, numbers.on(bucket[0].x.device), keep[done : done + len(bucket)])
        done += len(bucket)


def _sums(bucket: Sequence[Piece], n: dict[str, Sequence[Scalar]], accumulate: torch.dtype) -> list[Tensor]:
    o = bucket[0].options
    x, g, d = _operands(bucket)
    diff = list(torch._foreach_sub(d, g))
    if bucket[0].v is None:
        weighted = list(torch._foreach_div(diff, 1 + o.lambd))
        slope = _copies(d)
    else:
        _, metric = _metric(bucket, g, n)
        weighted = list(torch._foreach_mul(metric, o.lambd))
        torch._foreach_add_(weighted, 1.0)
        torch._foreach_mul_(weighted, metric)  # P q
        weighted = list(torch._foreach_div(diff, weighted))
        slope = list(torch._foreach_div(d, metric))
    torch._foreach_mul_(weighted, diff)
    dens = [t.sum(dtype=accumulate) for t in weighted]
    if o.mu:
        torch._foreach_add_(slope, x, alpha=o.mu)
    torch._foreach_copy_(weighted, g)
    torch._foreach_mul_(weighted, _pick(n["gap"], bucket))
    ahead = torch._foreach_sub(d, weighted)  # d - (1 + k) g
    torch._foreach_mul_(ahead, slope)
    return [torch.stack([t.sum(dtype=accumulate), den]) for t, den in zip(ahead, dens, strict=True)]


def _update(bucket: Sequence[Piece], n: dict[str, Sequence[Scalar]], keep: Sequence[Tensor]) -> None:
    o = bucket[0].options
    x, g, d = _operands(bucket)
    move = torch._foreach_sub(g, d)
    torch._foreach_mul_(move, _pick(n["omega"], bucket))
    if bucket[0].v is None:
        metric = None
        torch._foreach_div_(move, 1 + o.lambd)
    else:
        v, metric = _metric(bucket, g, n)
        q = list(torch._foreach_mul(metric, o.lambd))
        torch._foreach_add_(q, 1.0)
        torch._foreach_div_(move, q)
        _write([p.v for p in bucket if p.v is not None], v, keep)
    torch._foreach_add_(move, d)  # d'
    _write([p.d for p in bucket], [_rounded(p, new, n) for p, new in zip(bucket, move, strict=True)], keep)
    if metric is not None:
        torch._foreach_div_(move, metric)
    torch._foreach_mul_(move, _pick(n["lr"], bucket))
    new_x = torch._foreach_mul(x, _pick(n["shrink"], bucket)) if o.mu else x
    _write([p.x for p in bucket], torch._foreach_sub(new_x, move), keep)


def _operands(bucket: Sequence[Piece]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """x, g (ascent and coupled decay folded in), d in the compute dtype; no copy where nothing changes."""
    o, dtype = bucket[0].options, bucket[0].compute_dtype
    x, d = [p.x.to(dtype) for p in bucket], [p.d.to(dtype) for p in bucket]
    g = [p.g.to(dtype) for p in bucket]
    if o.maximize:
        g = list(torch._foreach_neg(g))
    if o.l2:
        g = list(torch._foreach_add(g, x, alpha=o.l2))
    return x, g, d


def _metric(
    bucket: Sequence[Piece], g: list[Tensor], n: dict[str, Sequence[Scalar]]
) -> tuple[list[Tensor], list[Tensor]]:
    """v' and P = c_t (sqrt(v' / (1 - beta2^t)) + eps), both new."""
    v = [p.v.to(p.compute_dtype) for p in bucket if p.v is not None]
    new_v = torch._foreach_lerp(v, torch._foreach_mul(g, g), 1 - bucket[0].options.beta2)
    metric = torch._foreach_sqrt(new_v)
    torch._foreach_mul_(metric, _pick(n["root"], bucket))
    torch._foreach_add_(metric, _pick(n["floor"], bucket))
    return list(new_v), list(metric)


def _write(old: list[Tensor], new: Sequence[Tensor], keep: Sequence[Tensor]) -> None:
    """old = new where kept. torch.where, not a product: NaN * 0 is NaN, and what is not kept must stay to the bit."""
    for target, source, kept in zip(old, new, keep, strict=True):
        torch.where(kept, source.to(target.dtype), target, out=target)


def _pick(column: Sequence[Scalar], bucket: Sequence[Piece]) -> list[Tensor]:
    return [column[p.row] for p in bucket]  # type: ignore[misc]


def _rounded(piece: Piece, new: Tensor, n: dict[str, Sequence[Scalar]]) -> Tensor:
    """d' as it is stored, where that takes more than a cast."""
    if not is_stochastic(piece):
        return new
    return stochastic(new, seed_of(n["step"][piece.row], piece.row), piece.first)  # type: ignore[arg-type]


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(t) for t in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def _buckets(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Neighbours with equal options, device and dtypes, at most 16 Mi elements together."""
    for _, same in groupby(pieces, key=lambda p: (p.options, p.x.device, [t.dtype for t in p.tensors()])):
        bucket: list[Piece] = []
        elements = 0
        for piece in same:
            if bucket and elements + piece.x.numel() > _BUCKET_ELEMENTS:
                yield bucket
                bucket, elements = [], 0
            bucket.append(piece)
            elements += piece.x.numel()
        yield bucket


def _count(piece: Piece) -> int:
    """How many parts a piece is taken in. One whose elements do not lie close together is taken whole."""
    if piece.x.numel() <= _BUCKET_ELEMENTS or not is_flat(piece.tensors()):
        return 1
    return -(-piece.x.numel() // _BUCKET_ELEMENTS)


def _in_parts(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces of at most a bucket each."""
    result = []
    for piece in pieces:
        if _count(piece) == 1:
            result.append(piece)
            continue
        columns = zip(*(torch.split(flat(tensor), _BUCKET_ELEMENTS) for tensor in piece.tensors()), strict=True)
        for i, (x, g, d, *v) in enumerate(columns):
            first = i * _BUCKET_ELEMENTS
            result.append(Piece(piece.row, x, g, d, v[0] if v else None, piece.options, first))
    return result
