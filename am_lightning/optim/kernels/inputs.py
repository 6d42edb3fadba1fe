"""What a kernel gets: the local shard of a logical parameter, its group's options, and this step's coefficients."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from am_lightning.optim.kernels.transfer import moved

SUM_BLOCK = 1 << 16  # elements summed in the working precision; across blocks sums are float64
_TOO_LARGE = {torch.float16: 65520.0, torch.bfloat16: 2.0**128 - 2.0**119}  # half a unit above the largest number


class GroupOptions(NamedTuple):
    """Options of a group that kernels take as numbers of the host."""

    beta2: float  # decay of the second moment; unused without one
    lambd: float
    mu: float  # decoupled weight decay
    l2: float  # coupled weight decay
    maximize: bool


@dataclass(eq=False, slots=True)
class LocalShard:
    """This process's part of one logical parameter; all tensors have one shape. ``v`` is None where P = 1.

    ``row`` is the place of the logical parameter in the packed sums, ``first`` the index of this part's first element
    where a kernel takes a shard in parts.
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
        """Elementwise work is done in float32 at least: in float16 P = 0 / (0 + 1e-8) is nan."""
        return torch.promote_types(self.x.dtype, torch.float32)

    def tensors(self) -> list[Tensor]:
        """x, g, d and, where there is one, v."""
        return [self.x, self.g, self.d] if self.v is None else [self.x, self.g, self.d, self.v]


class GradientClip(NamedTuple):
    """What the next step multiplies its gradients by: min(1, max_norm / (norm + 1e-6))."""

    norm: Tensor  # 0-dim
    max_norm: float

    def factor(self) -> Tensor:
        """0-dim."""
        return (self.max_norm / (self.norm + 1e-6)).clamp(max=1.0)


# This step's coefficients of every row: name -> ``[rows]`` on the device of the sums. ``one_plus_k`` is 1 + k, ``lr``
# eta_t, ``decay_factor`` 1 - mu eta_t, ``step`` the steps before this one; with a second moment ``c_root`` is
# c_t / sqrt(1 - beta2^t) and ``c_eps`` c_t eps; after the reduction ``omega`` is 1 - beta_t.
Coefficients: TypeAlias = "dict[str, Tensor]"


def on_host(coefficients: Coefficients) -> dict[str, list[float]]:
    """The coefficients as floats. Waits for the device that holds them; free where that is the CPU."""
    return {name: column.tolist() for name, column in coefficients.items()}


def on_device(coefficients: Coefficients, device: torch.device) -> dict[str, Sequence[Tensor]]:
    """The coefficients as 0-dim tensors on ``device``, without waiting."""
    return {name: moved(column, device).unbind() for name, column in coefficients.items()}


def too_large(dtype: torch.dtype) -> float:
    """The smallest number of a wider dtype that ``dtype`` rounds to inf."""
    return _TOO_LARGE.get(dtype, math.inf)


def is_addressable(tensors: Sequence[Tensor]) -> bool:
    """False where a tensor's elements are elsewhere than its address says: subclasses that wrap other tensors."""
    return all(tensor.data_ptr() or not tensor.numel() for tensor in tensors)


def is_flat(tensors: Sequence[Tensor]) -> bool:
    """True where one flat walk over the storage visits the same element of every tensor."""
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
    """``[numel]`` view in the order of the storage, for a dense tensor."""
    return tensor.as_strided((tensor.numel(),), (1,))


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply in place by a 0-dim number: one list for each device and dtype, and the number in that dtype.

    A number of another dtype would cost a launch for each tensor.
    """
    for members in alike(tensors):
        same = [tensors[i] for i in members]
        torch._foreach_mul_(same, moved(factor, same[0].device, same[0].dtype))


def alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices by device, dtype and whether the elements lie close together, which a list's single launch needs."""
    kinds: dict[Hashable, list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype, tensor.is_contiguous()), []).append(i)
    return list(kinds.values())
