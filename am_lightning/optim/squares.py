"""Sums of squares that stay exact for large tensors, without a full-size temporary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from am_lightning.optim.kernels.inputs import SUM_BLOCK, alike
from am_lightning.optim.kernels.transfer import moved


def square_sum(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the 0-dim sum of squares of a tensor, in the dtype and on the device of ``like``."""
    return square_sums([tensor], like)[0]


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return the 0-dim 2-norm of all tensors together, in the dtype and on the device of ``like``."""
    if tensors and len(alike(tensors)) == 1 and not _in_blocks(tensors[0].device):
        return moved(torch.linalg.vector_norm(_norms(tensors), dtype=like.dtype), like.device)
    return square_sums(tensors, like).sum().sqrt()


@torch.no_grad()
def square_sums(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return the sum of squares of each tensor, ``[tensors]``, in the dtype and on the device of ``like``.

    The CPU sums block by block in that dtype, because one float32 accumulator loses digits. Other devices sum in trees,
    in float32 at least, with one list of norms, one stack and one copy for all tensors of a device and dtype.
    """
    if not tensors:
        return like.new_empty(0)
    found: list[Tensor] = []
    order: list[int] = []
    for members in alike(tensors):
        same = [tensors[i] for i in members]
        if _in_blocks(same[0].device):
            squares = torch.stack([_by_blocks(tensor, like) for tensor in same])
        else:
            squares = moved(_norms(same), like.device, like.dtype).square()
        found.append(squares)
        order += members
    if order == list(range(len(tensors))):
        return found[0] if len(found) == 1 else torch.cat(found)
    columns = torch.cat(found).unbind()
    place = {member: at for at, member in enumerate(order)}
    return torch.stack([columns[place[i]] for i in range(len(tensors))])


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norms of tensors of one device and dtype, ``[tensors]``, in float32 at least."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=dtype))


def _in_blocks(device: torch.device) -> bool:
    return device.type == "cpu"


def _by_blocks(tensor: Tensor, like: Tensor) -> Tensor:
    blocks = torch.split(tensor.reshape(-1), SUM_BLOCK)
    return torch.stack([block.to(like.device, like.dtype).square().sum() for block in blocks]).sum()
