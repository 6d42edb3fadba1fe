"""The two passes with torch.compile: two small graphs for tensors of any size, on any device that Inductor supports.

Numbers that change from step to step are in a vector on the device, so that no graph is compiled again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from am_lightning.optim.kernels.inputs import Coefficients, LocalShard, flat, is_addressable, is_flat, too_large
from am_lightning.optim.kernels.rounding import is_stochastic, seed_of, stochastic
from am_lightning.optim.kernels.transfer import moved, uploaded
from am_lightning.optim.kernels.workspace import Workspace

_BLOCK = 1 << 14  # elements summed in the compute dtype; sums of blocks are added in float64
_COLUMNS = ("one_plus_k", "c_root", "c_eps", "lr", "decay_factor", "omega")


class _Vector(NamedTuple):
    """Numbers that change from step to step: 0-dim views of one vector on the device, in this order."""

    one_plus_k: Tensor
    c_root: Tensor
    c_eps: Tensor
    lr: Tensor
    decay_factor: Tensor
    omega: Tensor
    rate: Tensor  # 1 - beta2, computed in float64 and then rounded
    lambd: Tensor
    mu: Tensor
    too_large: Tensor
    active: Tensor


def supports(shard: LocalShard) -> bool:
    """Return whether the graphs support a shard.

    It must be flat in storage and have a second moment and no coupled weight decay. Tensors of one element are not
    supported, because torch.compile would specialise the graphs for them.
    """
    tensors = shard.tensors()
    plain = shard.v is not None and not shard.options.l2 and shard.x.numel() != 1
    return plain and is_flat(tensors) and is_addressable(tensors)


class CompiledPasses:
    """Both passes over shards that ``supports`` accepts."""

    def __init__(self, shards: Sequence[LocalShard], workspace: Workspace | None = None) -> None:
        self._shards = shards

    def sums(self, coefficients: Coefficients, accumulate: torch.dtype) -> Tensor:
        """Run pass 1, which only reads. Returns N and D, ``[shards, 2]``."""
        table = self._table(coefficients, None)
        run = _graphs()[0]
        # Parts of one shape are added up together, because each operator call costs as much as a small tensor does.
        by_shape: dict[tuple[int, torch.dtype], list[tuple[int, Tensor]]] = {}
        with _many_graphs():
            for i, (shard, vector) in enumerate(zip(self._shards, table, strict=True)):
                for part in _parts(_flat(shard)):
                    sums = run(*part, vector, shard.options.mu != 0, shard.options.maximize)
                    by_shape.setdefault((len(sums), sums.dtype), []).append((i, sums))
        pairs: list[Tensor | None] = [None] * len(self._shards)
        for members in by_shape.values():
            added = torch.stack([sums for _, sums in members]).sum(1, dtype=accumulate).unbind()
            for (i, _), pair in zip(members, added, strict=True):
                before = pairs[i]
                pairs[i] = pair if before is None else before + pair
        zero = torch.zeros(2, dtype=accumulate, device=self._shards[0].x.device)
        return torch.stack([zero if pair is None else pair for pair in pairs])

    def update(self, coefficients: Coefficients, active: Tensor) -> None:
        """Run pass 2, which writes d, v and x of the rows where ``active``, ``[rows]`` bool, is True."""
        table = self._table(coefficients, active)
        run = _graphs()[1]
        with _many_graphs():
            for shard, vector in zip(self._shards, table, strict=True):
                if shard.x.numel():
                    run(*_flat(shard), vector, _seed(shard, coefficients), shard.options.maximize)

    def _table(self, coefficients: Coefficients, active: Tensor | None) -> list[Tensor]:
        """Return the ``_Vector`` of each shard on its device, in its compute dtype."""
        columns = coefficients
        whole = torch.stack([columns.get(name, columns["one_plus_k"]) for name in _COLUMNS], 1)
        keep = torch.ones_like(whole[:, 0]) if active is None else active.to(whole.dtype)
        host = [[0.0, 0.0, 0.0, 0.0]] * len(whole)
        for shard in self._shards:
            o, stored = shard.options, shard.x.dtype if shard.v is None else shard.v.dtype
            host[shard.row] = [1 - o.beta2, o.lambd, o.mu, too_large(stored)]
        options = uploaded(host, whole.device, whole.dtype)
        whole = torch.cat([whole, options, keep[:, None]], 1)
        there: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for shard in self._shards:
            key = shard.x.device, shard.compute_dtype
            if key not in there:
                # Copies, because Dynamo would specialise the graphs on a view's storage offset.
                there[key] = [vector.clone() for vector in moved(whole, *key).unbind()]
        return [there[shard.x.device, shard.compute_dtype][shard.row] for shard in self._shards]


def _flat(shard: LocalShard) -> list[Tensor]:
    return [flat(tensor) for tensor in shard.tensors()]


def _seed(shard: LocalShard, coefficients: Coefficients) -> Tensor | None:
    if not is_stochastic(shard):
        return None
    return seed_of(moved(coefficients["step"][shard.row], shard.x.device), shard.row)


def _parts(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Split tensors into whole blocks, ``[blocks, _BLOCK]``, and a rest, ``[1, rest]``, of more than one element."""
    numel = tensors[0].numel()
    blocks, rest = divmod(numel, _BLOCK)
    if rest == 1:
        blocks -= 1
    border = blocks * _BLOCK if blocks > 1 else 0  # a view of one block would need another graph
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
    # Without these options Inductor writes P, which both sums read, into a buffer of the size of the tensor.
    options: dict[str, Any] = {"realize_reads_threshold": 64, "realize_opcount_threshold": 512}
    sums = torch.compile(_sums, dynamic=True, fullgraph=True, options=options)
    return sums, torch.compile(_update, dynamic=True, fullgraph=True, options=options)


def _many_graphs() -> AbstractContextManager[Any]:
    """Raise Dynamo's limit of 8 graphs for a function, because dtypes, storage offsets and options multiply."""
    from torch._dynamo import config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before torch 2.7
    limit: AbstractContextManager[Any] = config.patch({name: 64})
    return limit


def _sums(x: Tensor, g: Tensor, d: Tensor, v: Tensor, vector: Tensor, decays: bool, negate: bool) -> Tensor:
    """Return N and D of each block, ``[blocks, 2]``.

    N = sum (d - (1 + k) g) (d / P + mu x) and D = sum (d - g)^2 / (P q), which is nan if v' does not fit in its dtype.
    """
    c = _Vector(*vector.unbind())
    x, g, d = x.to(vector.dtype), g.to(vector.dtype), d.to(vector.dtype)
    g = -g if negate else g
    second, _, q, inverse = _precond(g, v.to(vector.dtype), c)
    diff = d - g
    den = torch.where(second < c.too_large, diff * (diff * inverse), torch.nan)
    slope = d * (inverse * q)
    slope = slope + c.mu * x if decays else slope
    num = (d - c.one_plus_k * g) * slope
    return torch.stack([num.sum(1), den.sum(1)], 1)


def _update(x: Tensor, g: Tensor, d: Tensor, v: Tensor, vector: Tensor, seed: Tensor | None, negate: bool) -> None:
    """Write d' = d + omega (g - d) / q,  x' = (1 - mu eta) x - eta d' / P  and v' if the row is active."""
    c = _Vector(*vector.unbind())
    y, g, old = x.to(vector.dtype), g.to(vector.dtype), d.to(vector.dtype)
    g = -g if negate else g
    second, precond, q, inverse = _precond(g, v.to(vector.dtype), c)
    new = old + c.omega * (g - old) * (inverse * precond)
    y = c.decay_factor * y - c.lr * (new * (inverse * q))
    stored = new.to(d.dtype) if seed is None else stochastic(new, seed)
    active = c.active > 0
    x.copy_(torch.where(active, y.to(x.dtype), x))
    d.copy_(torch.where(active, stored, d))
    v.copy_(torch.where(active, second.to(v.dtype), v))


def _precond(g: Tensor, v: Tensor, c: _Vector) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return v', P, q and 1 / (P q), so that one division serves 1 / P and 1 / q."""
    v = v + c.rate * (g * g - v)
    precond = c.c_root * v.sqrt() + c.c_eps
    q = 1 + c.lambd * precond
    return v, precond, q, 1 / (precond * q)
