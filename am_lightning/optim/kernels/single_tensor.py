"""The two passes as plain formulas, one tensor at a time: the kernels that the others are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from am_lightning.optim.kernels.inputs import Numbers, Piece, Scalar, too_large
from am_lightning.optim.kernels.rounding import is_stochastic, seed_of, stochastic_in_parts


def sums(pieces: Sequence[Piece], numbers: Numbers, accumulate: torch.dtype) -> list[Tensor]:
    """Pass 1, which only reads: ``[2]`` with N and D for each piece.

    N = sum (d - (1 + k) g) (d / P + mu x),  D = sum (d - g)^2 / (P q),  q = 1 + lambda P. D is nan where v' does not
    fit in its dtype: finite gradients whose square overflows hide from the sums, for they are divided by P.
    """
    result = []
    for piece in pieces:
        n = _numbers(piece, numbers)
        g, d, x = _operands(piece)
        v, metric = _metric(piece, g, n)
        q = 1 + piece.options.lambd * metric
        slope = d / metric + piece.options.mu * x
        num = ((d - n["gap"] * g) * slope).sum(dtype=accumulate)
        den = ((d - g) * ((d - g) / (metric * q))).sum(dtype=accumulate)
        if v is not None and piece.v is not None:
            den = torch.where((v < too_large(piece.v.dtype)).all(), den, torch.nan)
        result.append(torch.stack([num, den]))
    return result


def update(pieces: Sequence[Piece], numbers: Numbers, keep: Sequence[Tensor] | None) -> None:
    """Pass 2, which writes: d' = d + omega (g - d) / q,  x' = (1 - mu eta) x - eta d' / P,  v'.

    Args:
        keep: 0-dim bool for each piece, nothing is written where it is False; None writes all.
    """
    for i, piece in enumerate(pieces):
        n = _numbers(piece, numbers)
        g, d, x = _operands(piece)
        v, metric = _metric(piece, g, n)
        q = 1 + piece.options.lambd * metric
        d = d + n["omega"] * (g - d) / q
        x = n["shrink"] * x - n["lr"] * d / metric
        if is_stochastic(piece):
            d = stochastic_in_parts(d, seed_of(torch.as_tensor(n["step"], device=d.device), piece.row))
        for old, new in ((piece.d, d), (piece.v, v), (piece.x, x)):
            if old is not None and new is not None:
                new = new.to(old.dtype)
                old.copy_(new if keep is None else torch.where(keep[i], new, old))


def _numbers(piece: Piece, numbers: Numbers) -> dict[str, Scalar]:
    """This row's numbers: floats on the CPU, 0-dim tensors of the compute dtype elsewhere."""
    device = piece.x.device
    if device.type == "cpu":
        return {name: column[piece.row] for name, column in numbers.on_host().items()}
    return {name: _scalar(column[piece.row], piece.compute_dtype) for name, column in numbers.on(device).items()}


def _scalar(value: Scalar, dtype: torch.dtype) -> Scalar:
    return value.to(dtype) if isinstance(value, Tensor) else value


def _operands(piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
    """g (ascent and coupled decay folded in), d, x in the compute dtype."""
    dtype = piece.compute_dtype
    g, d, x = piece.g.to(dtype), piece.d.to(dtype), piece.x.to(dtype)
    if piece.options.maximize:
        g = -g
    if piece.options.l2:
        g = g + piece.options.l2 * x
    return g, d, x


def _metric(piece: Piece, g: Tensor, n: dict[str, Scalar]) -> tuple[Tensor | None, Tensor | float]:
    """v' and P = c (sqrt(v' / (1 - beta2^t)) + eps); the identity metric is 1."""
    if piece.v is None:
        return None, 1.0
    v = torch.lerp(piece.v.to(g.dtype), g * g, 1 - piece.options.beta2)
    return v, n["root"] * v.sqrt() + n["floor"]
