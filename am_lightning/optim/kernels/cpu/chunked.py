"""The two passes on the CPU with cache blocking: tensors are processed in chunks, with a few reused buffers.

There is no temporary of the size of a tensor (scratch takes at most 7 MiB), and those of a chunk stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from am_lightning.optim.kernels.inputs import (
    SUM_BLOCK,
    Coefficients,
    LocalShard,
    flat,
    is_flat,
    on_host,
    too_large,
)
from am_lightning.optim.kernels.rounding import is_stochastic, seed_of, stochastic_in_parts
from am_lightning.optim.kernels.workspace import Workspace

_WORTH_IT = 1 << 14  # elements; foreach is faster for smaller shards, because it takes many at once
Host = dict[str, list[float]]  # coefficients of all rows by name

_BUFFER_BYTES = 5 << 18  # 320 Ki float32 elements; larger ones are hardly faster, and up to five are needed


class Scratch:
    """Buffers of the size of a chunk, allocated at their first use and kept for later steps."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, str], Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, numel: int) -> Tensor:
        """Return an uninitialised buffer, ``[numel]``. Calls with the same name and dtype share its memory."""
        buffer = self._buffers.get((dtype, name))
        if buffer is None or buffer.numel() < numel:
            self._release_other_dtypes(dtype)
            buffer = self._buffers[dtype, name] = torch.empty(numel, dtype=dtype, device="cpu")
        return buffer if buffer.numel() == numel else buffer[:numel]

    def _release_other_dtypes(self, dtype: torch.dtype) -> None:
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key[0] == dtype}


def chunk_elements(dtype: torch.dtype, *, copies: bool = False) -> int:
    """Return the elements of a chunk with compute dtype ``dtype``, halved if operands are copied to scratch."""
    return _BUFFER_BYTES // dtype.itemsize // (2 if copies else 1)


@dataclass(eq=False)
class _Chunk:
    """Part of a shard. g, d, v and x are in the compute dtype: views of the tensors, or copies in scratch."""

    g: Tensor
    d: Tensor
    v: Tensor | None
    x: Tensor
    stored: dict[str, Tensor]  # views of the tensors, by name
    a: Tensor  # scratch
    b: Tensor
    q: Tensor
    first: int  # index of the first element in the shard

    def write_back(self, seed: Tensor | None) -> None:
        """Round copies in scratch to the dtypes of the tensors and write them. With a seed, d rounds stochastically."""
        for name, work in (("d", self.d), ("v", self.v), ("x", self.x)):
            if work is not None and work is not self.stored[name]:
                rounded = work if seed is None or name != "d" else stochastic_in_parts(work, seed, self.first)
                self.stored[name].copy_(rounded)


def supports(shard: LocalShard) -> bool:
    """Return whether the shard is flat in storage, and large enough for about thirty operator calls to pay."""
    return shard.x.numel() >= _WORTH_IT and is_flat(shard.tensors())


class ChunkedPasses:
    """Both passes over shards that ``supports`` accepts, one after the other."""

    def __init__(self, shards: Sequence[LocalShard], workspace: Workspace) -> None:
        self._shards, self._scratch = shards, workspace.keep(Scratch)

    def sums(self, coefficients: Coefficients, accumulate: torch.dtype) -> Tensor:
        """Run pass 1, which only reads. Returns N and D, ``[shards, 2]``."""
        host = on_host(coefficients)
        return torch.stack([_sums(shard, host, accumulate, self._scratch) for shard in self._shards])

    def update(self, coefficients: Coefficients, active: Tensor) -> None:
        """Run pass 2, which writes d, v and x of the rows where ``active``, ``[rows]`` bool, is True."""
        host, writes = on_host(coefficients), active.tolist()
        for shard in self._shards:
            if writes[shard.row]:
                _update(shard, host, self._scratch)


def _sums(shard: LocalShard, host: Host, accumulate: torch.dtype, scratch: Scratch) -> Tensor:
    one_plus_k, o = host["one_plus_k"][shard.row], shard.options
    c_eps = _as_scalar(host, "c_eps", shard)
    partial = torch.zeros(2, _block_count(shard), dtype=shard.compute_dtype, device=shard.x.device)
    nums, dens = (iter(line.unbind()) for line in partial)
    for c in _chunks(shard, scratch):
        torch.sub(c.d, c.g, out=c.b)
        if c.v is None:
            torch.div(c.b, 1 + o.lambd, out=c.q)
            _dots(c.b, c.q, dens)
            slope = torch.add(c.d, c.x, alpha=o.mu, out=c.a) if o.mu else c.d
        else:
            if not _precond_for_sums(c, shard, host, c_eps):
                return torch.full((2,), math.nan, dtype=accumulate, device=shard.x.device)
            torch.addcmul(c.a, c.a, c.a, value=o.lambd, out=c.q)  # P q
            torch.div(c.b, c.q, out=c.q)
            _dots(c.b, c.q, dens)
            slope = torch.div(c.d, c.a, out=c.b)
            if o.mu:
                slope.add_(c.x, alpha=o.mu)
        torch.sub(c.d, c.g, alpha=one_plus_k, out=c.q)
        _dots(c.q, slope, nums)
    return partial.sum(1, dtype=accumulate)


def _update(shard: LocalShard, host: Host, scratch: Scratch) -> None:
    o, row = shard.options, shard.row
    omega, lr, decay_factor = (host[name][row] for name in ("omega", "lr", "decay_factor"))
    seed = seed_of(torch.tensor(host["step"][row], device=shard.x.device), row) if is_stochastic(shard) else None
    c_eps, rate = _as_scalar(host, "c_eps", shard), _as_scalar(host, "omega", shard)
    one = torch.ones_like(rate)
    for c in _chunks(shard, scratch):
        if c.v is None:
            c.d.lerp_(c.g, omega / (1 + o.lambd))
        else:
            _second_moment(c, shard, out=c.v)
            _precond(c, c.v, c_eps, host["c_root"][row])
            torch.add(one, c.a, alpha=o.lambd, out=c.q)
            c.d.lerp_(c.g, torch.div(rate, c.q, out=c.q))
        if decay_factor != 1:
            c.x.mul_(decay_factor)
        if c.v is None:
            c.x.add_(c.d, alpha=-lr)
        else:
            c.x.addcdiv_(c.d, c.a, value=-lr)
        c.write_back(seed)


def _precond_for_sums(c: _Chunk, shard: LocalShard, host: Host, c_eps: Tensor) -> bool:
    """Set c.a to P without writing v'. Returns whether v' fits in its dtype."""
    assert c.v is not None
    beta2, c_root = shard.options.beta2, host["c_root"][shard.row]
    if beta2 > 0.5:  # v' / beta2 takes one operation, and its factor beta2 moves into c_root
        rate = (1 - beta2) / beta2
        torch.addcmul(c.v, c.g, c.g, value=rate, out=c.a)
        # Below the first bound no g^2 overflows, and below the second no v' does. Otherwise v' itself is checked.
        if float(c.a.amax()) < min(rate * torch.finfo(c.a.dtype).max, too_large(c.stored["v"].dtype)):
            _precond(c, c.a, c_eps, c_root * math.sqrt(beta2))
            return True
    _second_moment(c, shard, out=c.a)
    fits = float(c.a.amax()) < too_large(c.stored["v"].dtype)
    _precond(c, c.a, c_eps, c_root)
    return fits


def _second_moment(c: _Chunk, shard: LocalShard, out: Tensor) -> None:
    """Compute v' = v + (1 - beta2) (g^2 - v)."""
    assert c.v is not None
    torch.mul(c.g, c.g, out=c.a)
    torch.lerp(c.v, c.a, 1 - shard.options.beta2, out=out)


def _precond(c: _Chunk, v: Tensor, c_eps: Tensor, c_root: float) -> None:
    """Set c.a to P = c_root sqrt(v) + c_eps."""
    torch.sqrt(v, out=c.a)
    torch.add(c_eps, c.a, alpha=c_root, out=c.a)


def _as_scalar(host: Host, name: str, shard: LocalShard) -> Tensor:
    """Return a coefficient as a 0-dim tensor, so that a scaled sum or a quotient takes one operation."""
    values = host.get(name)
    value = 0.0 if values is None else values[shard.row]
    return torch.full((), value, dtype=shard.compute_dtype, device=shard.x.device)


def _dots(left: Tensor, right: Tensor, out: Iterator[Tensor]) -> None:
    """One dot product for each block of at most 64 Ki elements, so that no accumulator runs long."""
    for a, b in zip(_blocks(left), _blocks(right), strict=True):
        torch.dot(a, b, out=next(out))


def _blocks(tensor: Tensor) -> Sequence[Tensor]:
    if tensor.numel() % SUM_BLOCK:
        return torch.split(tensor, SUM_BLOCK)
    return tensor.view(-1, SUM_BLOCK).unbind()


def _chunk_size(shard: LocalShard) -> int:
    copies = any(tensor.dtype != shard.compute_dtype for tensor in shard.tensors())
    return chunk_elements(shard.compute_dtype, copies=copies)


def _block_count(shard: LocalShard) -> int:
    size = _chunk_size(shard)
    whole, rest = divmod(shard.x.numel(), size)
    return whole * (-(-size // SUM_BLOCK)) + -(-rest // SUM_BLOCK)


def _chunks(shard: LocalShard, scratch: Scratch) -> Iterator[_Chunk]:
    """Yield the chunks of a shard.

    Low-precision tensors are copied to scratch. g is also copied for ``maximize`` and coupled weight decay.
    """
    dtype, o = shard.compute_dtype, shard.options
    size = _chunk_size(shard)
    columns = {"g": shard.g, "d": shard.d, "x": shard.x}
    if shard.v is not None:
        columns["v"] = shard.v
    split = {name: torch.split(flat(tensor), size) for name, tensor in columns.items()}
    for k in range(-(-shard.x.numel() // size)):
        stored = {name: parts[k] for name, parts in split.items()}
        numel = stored["x"].numel()
        work = {n: t if t.dtype == dtype else scratch.take(n, dtype, numel).copy_(t) for n, t in stored.items()}
        if o.maximize or o.l2:
            g = torch.mul(work["g"], -1.0 if o.maximize else 1.0, out=scratch.take("g", dtype, numel))
            work["g"] = g.add_(work["x"], alpha=o.l2) if o.l2 else g
        a, b, q = (scratch.take(name, dtype, numel) for name in ("a", "b", "q"))
        yield _Chunk(work["g"], work["d"], work.get("v"), work["x"], stored, a, b, q, k * size)
