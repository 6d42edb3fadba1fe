"""The two passes through torch.compile: two small graphs for tensors of any size, on any device that Inductor serves.

What changes from step to step comes in a device vector, so that no graph is compiled again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from am_lightning.optim.kernels.inputs import Numbers, Piece, flat, is_addressable, is_flat, too_large
from am_lightning.optim.kernels.rounding import is_stochastic, seed_of, stochastic
from am_lightning.optim.kernels.transfer import moved, uploaded

_BLOCK = 1 << 14  # elements summed in the working precision; across blocks sums are float64
_COLUMNS = ("gap", "root", "floor", "lr", "shrink", "omega")  # the first places of the vector
_RATE, _LAMBD, _MU, _TOO_LARGE, _KEEP = range(6, 11)  # the rate 1 - beta2 is formed in float64, and then rounded


def supports(piece: Piece) -> bool:
    """Whether the graphs can do a row: they walk the storage, have a second moment and no coupled decay.

    One element is left out, for which torch.compile would make graphs of their own.
    """
    tensors = piece.tensors()
    plain = piece.v is not None and not piece.options.l2 and piece.x.numel() != 1
    return plain and is_flat(tensors) and is_addressable(tensors)


class CompiledPasses:
    """Both passes of one step over pieces that ``supports`` has accepted."""

    words = "torch.compile"

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._flat = [[flat(tensor) for tensor in piece.tensors()] for piece in pieces]

    def sums(self, numbers: Numbers, accumulate: torch.dtype) -> Tensor:
        """Pass 1, which only reads: ``[pieces, 2]``, N and D."""
        table = self._table(numbers, None)
        run = _graphs()[0]
        # Parts of one shape are added up together, for each call of an operator costs as much as a small tensor.
        by_shape: dict[tuple[int, torch.dtype], list[tuple[int, Tensor]]] = {}
        with _many_graphs():
            for i, (piece, tensors, vector) in enumerate(zip(self._pieces, self._flat, table, strict=True)):
                for part in _parts(tensors):
                    sums = run(*part, vector, piece.options.mu != 0, piece.options.maximize)
                    by_shape.setdefault((len(sums), sums.dtype), []).append((i, sums))
        pairs: list[Tensor | None] = [None] * len(self._pieces)
        for members in by_shape.values():
            added = torch.stack([sums for _, sums in members]).sum(1, dtype=accumulate).unbind()
            for (i, _), pair in zip(members, added, strict=True):
                before = pairs[i]
                pairs[i] = pair if before is None else before + pair
        zero = torch.zeros(2, dtype=accumulate, device=self._pieces[0].x.device)
        return torch.stack([zero if pair is None else pair for pair in pairs])

    def update(self, numbers: Numbers, counts: Tensor) -> None:
        """Pass 2, which writes d, v and x of the rows where ``counts`` (``[rows]`` bool) is True."""
        table = self._table(numbers, counts)
        run = _graphs()[1]
        with _many_graphs():
            for piece, tensors, vector in zip(self._pieces, self._flat, table, strict=True):
                if piece.x.numel():
                    run(*tensors, vector, _seed(piece, numbers), piece.options.maximize)

    def _table(self, numbers: Numbers, counts: Tensor | None) -> list[Tensor]:
        """Each piece's vector on its device, in its compute dtype."""
        columns = numbers.columns
        whole = torch.stack([columns.get(name, columns["gap"]) for name in _COLUMNS], 1)
        keep = torch.ones_like(whole[:, 0]) if counts is None else counts.to(whole.dtype)
        host = [[0.0, 0.0, 0.0, 0.0]] * len(whole)
        for piece in self._pieces:
            o, stored = piece.options, piece.x.dtype if piece.v is None else piece.v.dtype
            host[piece.row] = [1 - o.beta2, o.lambd, o.mu, too_large(stored)]
        options = uploaded(host, whole.device, whole.dtype)
        whole = torch.cat([whole, options, keep[:, None]], 1)
        there: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for piece in self._pieces:
            key = piece.x.device, piece.compute_dtype
            if key not in there:
                # Copies, for the place of a view in its storage is one more number that a graph is made for.
                there[key] = [vector.clone() for vector in moved(whole, *key).unbind()]
        return [there[piece.x.device, piece.compute_dtype][piece.row] for piece in self._pieces]


def _seed(piece: Piece, numbers: Numbers) -> Tensor | None:
    if not is_stochastic(piece):
        return None
    return seed_of(moved(numbers.columns["step"][piece.row], piece.x.device), piece.row)


def _parts(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Whole blocks as ``[blocks, _BLOCK]`` and the rest as ``[1, rest]``, never of one element."""
    numel = tensors[0].numel()
    blocks, rest = divmod(numel, _BLOCK)
    if rest == 1:
        blocks -= 1
    border = blocks * _BLOCK if blocks > 1 else 0  # one block would be a graph of its own
    parts = []
    if border:
        whole = tensors if border == numel else [tensor[:border] for tensor in tensors]
        parts.append([tensor.view(-1, _BLOCK) for tensor in whole])
    if border < numel:
        rest_of = [tensor[border:] for tensor in tensors] if border else tensors
        parts.append([tensor.view(1, -1) for tensor in rest_of])
    return parts


@functools.cache
def _graphs() -> tuple[Callable[..., Any], Callable[..., Any]]:
    # Inductor must not put P, which both sums read, into memory: it did, as a buffer of the size of the tensor.
    options: dict[str, Any] = {"realize_reads_threshold": 64, "realize_opcount_threshold": 512}
    sums = torch.compile(_sums, dynamic=True, fullgraph=True, options=options)
    return sums, torch.compile(_update, dynamic=True, fullgraph=True, options=options)


def _many_graphs() -> AbstractContextManager[Any]:
    """Dynamo allows 8 of a function; other dtypes, views at other places, with and without decay and so on add up."""
    from torch._dynamo import config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before torch 2.7
    limit: AbstractContextManager[Any] = config.patch({name: 64})
    return limit


def _sums(x: Tensor, g: Tensor, d: Tensor, v: Tensor, h: Tensor, decays: bool, negate: bool) -> Tensor:
    """``[blocks, 2]`` of N = sum (d - gap g) (d / P + mu x), D = sum (d - g)^2 / (P q), nan where v' does not fit."""
    x, g, d = x.to(h.dtype), g.to(h.dtype), d.to(h.dtype)
    g = -g if negate else g
    second, _, scale, inverse = _metric(g, v, h)
    diff = d - g
    den = torch.where(second < h[_TOO_LARGE], diff * (diff * inverse), torch.nan)
    slope = d * (inverse * scale)
    slope = slope + h[_MU] * x if decays else slope
    num = (d - h[0] * g) * slope
    return torch.stack([num.sum(1), den.sum(1)], 1)


def _update(x: Tensor, g: Tensor, d: Tensor, v: Tensor, h: Tensor, seed: Tensor | None, negate: bool) -> None:
    """d' = d + omega (g - d) / q,  x' = shrink x - lr d' / P,  v': written where the vector says so."""
    y, g, old = x.to(h.dtype), g.to(h.dtype), d.to(h.dtype)
    g = -g if negate else g
    second, metric, scale, inverse = _metric(g, v, h)
    new = old + h[5] * (g - old) * (inverse * metric)
    y = h[4] * y - h[3] * (new * (inverse * scale))
    stored = new.to(d.dtype) if seed is None else stochastic(new, seed)
    keep = h[_KEEP] > 0
    x.copy_(torch.where(keep, y.to(x.dtype), x))
    d.copy_(torch.where(keep, stored, d))
    v.copy_(torch.where(keep, second.to(v.dtype), v))


def _metric(g: Tensor, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """v', P, q and 1 / (P q): one division serves 1 / P and 1 / q."""
    v = v.to(h.dtype)
    v = v + h[_RATE] * (g * g - v)
    metric = h[1] * v.sqrt() + h[2]
    scale = 1 + h[_LAMBD] * metric
    return v, metric, scale, 1 / (metric * scale)
