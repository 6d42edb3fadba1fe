"""Stochastic rounding to bfloat16 without a random generator: the noise is a hash of (row, step, element).

Replicas therefore round alike, and a resumed run continues as if it had not stopped. E[round(y)] = y, whereas rounding
to nearest loses every change of less than half a unit in the last place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from am_lightning.optim.kernels.inputs import LocalShard

_ROW = 0x9E3779B9
_MASK = 0xFFFFFFFF
_PART = 1 << 15  # elements, each with about 40 bytes of temporaries


def is_stochastic(shard: LocalShard) -> bool:
    """Return whether d is rounded stochastically: the parameter is float32 and d is bfloat16."""
    return shard.d.dtype == torch.bfloat16 and shard.x.dtype == torch.float32


def mix(x: Tensor) -> Tensor:
    """Hash 32-bit words held in int64. It is a bijection in which each bit of the input flips half of the output."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def seed_of(step: Tensor, row: int) -> Tensor:
    """Return the seed of a row, a 0-dim int64 word. ``step`` is the number of earlier steps of the row."""
    return mix((step.to(torch.int64) + _ROW * (row + 1)) & _MASK)


def seeds_of(steps: Tensor, rows: Tensor) -> Tensor:
    """Return the seeds of many rows from int64 vectors. See ``seed_of``."""
    return mix((steps + _ROW * (rows + 1)) & _MASK)


def stochastic(y: Tensor, seed: Tensor, first: int = 0) -> Tensor:
    """Round float32 ``y`` to bfloat16. inf and nan stay.

    Args:
        y: the tensor to round.
        seed: the seed of the row from ``seed_of``.
        first: index of the first element of ``y`` in the row's shard, in the order of the shape of ``y`` (default: 0).
    """
    index = torch.arange(first, first + y.numel(), dtype=torch.int64, device=y.device).view(y.shape)
    return _with_noise(y, (mix((index & _MASK) ^ seed) >> 16).to(torch.int32))


def stochastic_in_parts(y: Tensor, seed: Tensor, first: int = 0) -> Tensor:
    """Round a tensor of any size as ``stochastic`` does, with about 2 MiB of temporaries."""
    out = torch.empty_like(y, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    parts = zip(torch.split(y.reshape(-1), _PART), torch.split(out.view(-1), _PART), strict=True)
    for i, (part, target) in enumerate(parts):
        target.copy_(stochastic(part, seed, first + i * _PART))
    return out


def stochastic_at(y: Tensor, seeds: Tensor, starts: Tensor) -> Tensor:
    """Round float32 ``y``, ``[blocks, elements]``, as ``stochastic`` does, with temporaries of 4 bytes per element.

    Args:
        y: the tensor to round.
        seeds: ``[blocks, 1]``, the seed of the row of each block.
        starts: ``[blocks]``, index of the first element of each block in the row's shard.
    """
    noise = _word(starts)[:, None] + torch.arange(y.shape[1], dtype=torch.int32, device=y.device)
    noise.bitwise_xor_(_word(seeds))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)), (16, 1)):  # ``mix`` in int32, which wraps
        noise.bitwise_xor_((noise >> shift).bitwise_and_((1 << 32 - shift) - 1)).mul_(factor)
    return _with_noise(y, (noise >> 16).bitwise_and_(0xFFFF))


def _word(values: Tensor) -> Tensor:
    """Return the lower 32 bits of int64 values as int32."""
    low = values & _MASK
    return (low - ((low >> 31) << 32)).to(torch.int32)


def _with_noise(y: Tensor, noise: Tensor) -> Tensor:
    """Add noise to the lower 16 bits of ``y``, and return the upper 16 bits as bfloat16."""
    y = y.contiguous()
    bits = y.view(torch.int32)
    rounded = ((bits + noise) & -0x10000).view(torch.float32)
    return torch.where((bits & 0x7F800000) == 0x7F800000, y, rounded).to(torch.bfloat16)
