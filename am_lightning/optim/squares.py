"""Sums of squares that stay exact for large tensors, without a full-size temporary."""

from __future__ import annotations

import torch
from torch import Tensor

from am_lightning.optim.kernels.pieces import SUM_BLOCK
from am_lightning.optim.kernels.transfer import moved


def square_sum(tensor: Tensor, like: Tensor) -> Tensor:
    """0-dim sum of squares of any tensor, in the dtype and on the device of ``like``.

    On the CPU block by block in that dtype (one float32 accumulator loses digits); elsewhere by the device's own tree.
    """
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        blocks = torch.split(tensor.reshape(-1), SUM_BLOCK)
        return torch.stack([block.to(like.device, like.dtype).square().sum() for block in blocks]).sum()
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
    return moved(norm, like.device, like.dtype).square()
