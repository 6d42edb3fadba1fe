"""Inputs of kernels: local shards of logical parameters, options of their groups, and the coefficients of a step."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from am_lightning.optim.kernels.transfer import moved

SUM_BLOCK = 1 << 16  # elements summed in the compute dtype; sums of blocks are added in float64
_TOO_LARGE = {torch.float16: 65520.0, torch.bfloat16: 2.0**128 - 2.0**119}  # half a ulp above the largest number


class GroupOptions(NamedTuple):
    """Options of a group that kernels take as Python numbers."""

    beta2: float  # decay of the second moment; unused without one
    lambd: float
    mu: float  # decoupled weight decay
    l2: float  # coupled weight decay
    maximize: bool


@dataclass(eq=False, slots=True)
class LocalShard:
    """The part of one logical parameter that this process holds.

    Attributes:
        row: index of the logical parameter in the packed sums.
        x, g, d: parameter, gradient and direction, all of one shape.
        v: second moment of the same shape, or None if P = 1.
        options: options of the parameter group.
        first: index of the first element, if a kernel processes a shard in parts (default: 0).
    """

    row: int
    x: Tensor
    g: Tensor
    d: Tensor
    v: Tensor | None
    options: GroupOptions
    first: int = 0

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of elementwise operations, at least float32. In float16, 0 / (0 + 1e-8) would be nan."""
        return torch.promote_types(self.x.dtype, torch.float32)

    def tensors(self) -> list[Tensor]:
        """Return x, g, d and, unless it is None, v."""
        return [self.x, self.g, self.d] if self.v is None else [self.x, self.g, self.d, self.v]


class GradientClip(NamedTuple):
    """Clipping of the next step, which multiplies its gradients by min(1, max_norm / (norm + 1e-6))."""

    norm: Tensor  # 0-dim
    max_norm: float

    def factor(self) -> Tensor:
        """Return the factor, a 0-dim tensor."""
        return (self.max_norm / (self.norm + 1e-6)).clamp(max=1.0)


# Coefficients of a step by name, each ``[rows]`` on the device of the sums: ``one_plus_k`` = 1 + k, ``lr`` = eta_t,
# ``decay_factor`` = 1 - mu eta_t, and ``step``, the number of earlier steps. With a second moment there are
# ``c_root`` = c_t / sqrt(1 - beta2^t) and ``c_eps`` = c_t eps. After the reduction there is ``omega`` = 1 - beta_t.
Coefficients: TypeAlias = "dict[str, Tensor]"


def on_host(coefficients: Coefficients) -> dict[str, list[float]]:
    """Return the coefficients as floats. Waits for the device that holds them, unless it is the CPU."""
    return {name: column.tolist() for name, column in coefficients.items()}


def on_device(coefficients: Coefficients, device: torch.device) -> dict[str, Sequence[Tensor]]:
    """Return the coefficients as 0-dim tensors on ``device``, without waiting."""
    return {name: moved(column, device).unbind() for name, column in coefficients.items()}


def too_large(dtype: torch.dtype) -> float:
    """Return the smallest number of a wider dtype that rounds to inf in ``dtype``."""
    return _TOO_LARGE.get(dtype, math.inf)


def is_addressable(tensors: Sequence[Tensor]) -> bool:
    """Return whether the elements of all tensors are at their addresses, unlike in subclasses that wrap tensors."""
    return all(tensor.data_ptr() or not tensor.numel() for tensor in tensors)


def is_flat(tensors: Sequence[Tensor]) -> bool:
    """Return whether one loop over the storage visits the same element of every tensor, without gaps."""
    first, strides = tensors[0], tensors[0].stride()
    for other in tensors:
        if other.stride() != strides:
            return False
    if first.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, first.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def flat(tensor: Tensor) -> Tensor:
    """Return a view of a dense tensor in the order of its storage, ``[numel]``."""
    return tensor.as_strided((tensor.numel(),), (1,))


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply tensors in place by a 0-dim ``factor``, with one operation for each device and dtype.

    The factor is cast to the dtype of the tensors, because another dtype would cost a launch for each tensor.
    """
    for members in alike(tensors):
        same = [tensors[i] for i in members]
        torch._foreach_mul_(same, moved(factor, same[0].device, same[0].dtype))


def alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return lists of indices of tensors that a multi-tensor operator takes in one launch.

    Their device, dtype and contiguity are the same.
    """
    kinds: dict[Hashable, list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype, tensor.is_contiguous()), []).append(i)
    return list(kinds.values())
