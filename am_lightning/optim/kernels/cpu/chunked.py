"""The two passes on the CPU, cache-blocked: tensors are walked in chunks, a few buffers hold all temporaries.

No full-size temporary exists (at most 7 MiB of scratch), and a chunk's temporaries stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from am_lightning.optim.kernels.inputs import SUM_BLOCK, Numbers, Piece, Scalar, flat, too_large
from am_lightning.optim.kernels.rounding import is_stochastic, seed_of, stochastic

_BUFFER_BYTES = 1 << 20  # 256 Ki float32 elements: the fastest of 32 Ki .. 1 Mi on a server CPU


class Scratch:
    """Buffers of one chunk each, made when first needed and used again at every step."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, str], Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, numel: int) -> Tensor:
        """``[numel]`` uninitialised; the same memory at every call with this name and dtype."""
        key = (dtype, name)
        if key not in self._buffers or self._buffers[key].numel() < numel:
            self._release_other_dtypes(dtype)
            self._buffers[key] = torch.empty(numel, dtype=dtype, device="cpu")
        return self._buffers[key][:numel]

    def _release_other_dtypes(self, dtype: torch.dtype) -> None:
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key[0] == dtype}


def chunk_elements(dtype: torch.dtype, *, copies: bool = False) -> int:
    """Elements in a chunk whose working dtype is ``dtype``; half of them where all operands are copied to scratch."""
    return _BUFFER_BYTES // dtype.itemsize // (2 if copies else 1)


@dataclass(eq=False)
class _Chunk:
    """Part of a piece. g, d, v, x are in the working dtype: views of the tensors, or copies in scratch."""

    g: Tensor
    d: Tensor
    v: Tensor | None
    x: Tensor
    stored: dict[str, Tensor]  # the views of the tensors themselves
    a: Tensor  # scratch
    b: Tensor
    q: Tensor
    first: int  # index of its first element in the piece

    def write_back(self, seed: Tensor | None) -> None:
        """Round what was worked on in scratch into the tensors; d stochastically with a seed."""
        for name, work in (("d", self.d), ("v", self.v), ("x", self.x)):
            if work is not None and work is not self.stored[name]:
                rounded = work if seed is None or name != "d" else stochastic(work, seed, self.first)
                self.stored[name].copy_(rounded)


def sums(pieces: Sequence[Piece], numbers: Numbers, accumulate: torch.dtype, scratch: Scratch) -> list[Tensor]:
    """Pass 1, which only reads: ``[2]`` with N and D for each piece."""
    return [_sums(piece, numbers, accumulate, scratch) for piece in pieces]


def update(pieces: Sequence[Piece], numbers: Numbers, scratch: Scratch) -> None:
    """Pass 2, which writes d, v and x."""
    for piece in pieces:
        _update(piece, numbers, scratch)


def _sums(piece: Piece, numbers: Numbers, accumulate: torch.dtype, scratch: Scratch) -> Tensor:
    host, o = numbers.on_host(), piece.options
    gap = float(host["gap"][piece.row])
    partial = torch.zeros(2, _block_count(piece), dtype=piece.compute_dtype, device=piece.x.device)
    nums, dens = (iter(line.unbind()) for line in partial)
    for c in _chunks(piece, scratch):
        torch.sub(c.d, c.g, out=c.b)
        if c.v is None:
            torch.div(c.b, 1 + o.lambd, out=c.q)
            _dots(c.b, c.q, dens)
            slope = torch.add(c.d, c.x, alpha=o.mu, out=c.a) if o.mu else c.d
        else:
            if not _metric_for_sums(c, piece, host):
                return torch.full((2,), math.nan, dtype=accumulate, device=piece.x.device)
            torch.addcmul(c.a, c.a, c.a, value=o.lambd, out=c.q)  # P q
            torch.div(c.b, c.q, out=c.q)
            _dots(c.b, c.q, dens)
            slope = torch.div(c.d, c.a, out=c.b)
            if o.mu:
                slope.add_(c.x, alpha=o.mu)
        torch.sub(c.d, c.g, alpha=gap, out=c.q)
        _dots(c.q, slope, nums)
    return partial.sum(1, dtype=accumulate)


def _update(piece: Piece, numbers: Numbers, scratch: Scratch) -> None:
    host, o, i = numbers.on_host(), piece.options, piece.row
    omega, lr, shrink = float(host["omega"][i]), float(host["lr"][i]), float(host["shrink"][i])
    seed = seed_of(torch.tensor(host["step"][i], device=piece.x.device), i) if is_stochastic(piece) else None
    for c in _chunks(piece, scratch):
        torch.sub(c.g, c.d, out=c.b)
        if c.v is None:
            c.d.add_(c.b, alpha=omega / (1 + o.lambd))
        else:
            _second_moment(c, piece, out=c.v)
            _metric(c, piece, host, c.v)
            torch.add(_as_scalar(1.0, c.a), c.a, alpha=o.lambd, out=c.q)
            c.d.addcdiv_(c.b, c.q, value=omega)
        if shrink != 1:
            c.x.mul_(shrink)
        if c.v is None:
            c.x.add_(c.d, alpha=-lr)
        else:
            c.x.addcdiv_(c.d, c.a, value=-lr)
        c.write_back(seed)


def _metric_for_sums(c: _Chunk, piece: Piece, host: dict[str, Sequence[Scalar]]) -> bool:
    """c.a = P, and nothing is written; False where v' does not fit in its dtype."""
    assert c.v is not None
    beta2 = piece.options.beta2
    if beta2 > 0.5:  # v' / beta2 is one operation, and beta2 goes under the root
        rate = (1 - beta2) / beta2
        torch.addcmul(c.v, c.g, c.g, value=rate, out=c.a)
        # Below the first no g^2 overflows, below the second no v'; beyond either what is written decides.
        if float(c.a.amax()) < min(rate * torch.finfo(c.a.dtype).max, too_large(c.stored["v"].dtype)):
            _metric(c, piece, host, c.a, math.sqrt(beta2))
            return True
    _second_moment(c, piece, out=c.a)
    fits = float(c.a.amax()) < too_large(c.stored["v"].dtype)
    _metric(c, piece, host, c.a)
    return fits


def _second_moment(c: _Chunk, piece: Piece, out: Tensor) -> None:
    """v' = v + (1 - beta2) (g^2 - v)."""
    assert c.v is not None
    torch.mul(c.g, c.g, out=c.a)
    torch.lerp(c.v, c.a, 1 - piece.options.beta2, out=out)


def _metric(c: _Chunk, piece: Piece, host: dict[str, Sequence[Scalar]], v: Tensor, scale: float = 1.0) -> None:
    """c.a = P = c_t (sqrt(v' / (1 - beta2^t)) + eps), of v = v' / scale^2."""
    root, floor = float(host["root"][piece.row]), float(host["floor"][piece.row])
    torch.sqrt(v, out=c.a)
    torch.add(_as_scalar(floor, c.a), c.a, alpha=root * scale, out=c.a)


def _as_scalar(value: float, like: Tensor) -> Tensor:
    """0-dim, so that value + alpha * tensor is one operation."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _dots(left: Tensor, right: Tensor, out: Iterator[Tensor]) -> None:
    """One dot product for each block of at most 64 Ki elements, so that no accumulator runs long."""
    for a, b in zip(torch.split(left, SUM_BLOCK), torch.split(right, SUM_BLOCK), strict=True):
        torch.dot(a, b, out=next(out))


def _chunk_size(piece: Piece) -> int:
    return chunk_elements(piece.compute_dtype, copies=piece.x.dtype != piece.compute_dtype)


def _block_count(piece: Piece) -> int:
    size = _chunk_size(piece)
    whole, rest = divmod(piece.x.numel(), size)
    return whole * (-(-size // SUM_BLOCK)) + -(-rest // SUM_BLOCK)


def _chunks(piece: Piece, scratch: Scratch) -> Iterator[_Chunk]:
    """Walk the piece. Low-precision tensors are copied to scratch, g also where a sign or a decay is folded in."""
    dtype, o = piece.compute_dtype, piece.options
    size = _chunk_size(piece)
    columns = {"g": piece.g, "d": piece.d, "x": piece.x}
    if piece.v is not None:
        columns["v"] = piece.v
    split = {name: torch.split(flat(tensor), size) for name, tensor in columns.items()}
    for k in range(-(-piece.x.numel() // size)):
        stored = {name: parts[k] for name, parts in split.items()}
        numel = stored["x"].numel()
        work = {n: t if t.dtype == dtype else scratch.take(n, dtype, numel).copy_(t) for n, t in stored.items()}
        if o.maximize or o.l2:
            g = torch.mul(work["g"], -1.0 if o.maximize else 1.0, out=scratch.take("g", dtype, numel))
            work["g"] = g.add_(work["x"], alpha=o.l2) if o.l2 else g
        a, b, q = (scratch.take(name, dtype, numel) for name in ("a", "b", "q"))
        yield _Chunk(work["g"], work["d"], work.get("v"), work["x"], stored, a, b, q, k * size)
