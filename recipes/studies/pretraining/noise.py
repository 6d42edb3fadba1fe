"""How noisy a batch's gradient is, from the gradients of its micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def noisy_backward(
    parameters: Sequence[Tensor], parts: Sequence[Tensor], loss_of: Callable[[Tensor], Tensor]
) -> tuple[float, float, float]:
    """The backward pass of a batch, part by part, with the size of the parts' gradients.

    Args:
        parameters: whose ``.grad`` is None before, and the mean gradient of the batch after.
        parts: micro-batches of one size.
        loss_of: mean loss of a micro-batch.

    Returns:
        The batch's loss, the mean over parts of |gradient|^2, and |mean gradient|^2.
    """
    total = [torch.zeros_like(parameter) for parameter in parameters]
    loss = norms = 0.0
    for part in parts:
        value = loss_of(part)
        gradients = torch.autograd.grad(value, parameters)
        for mean, gradient in zip(total, gradients, strict=True):
            mean.add_(gradient, alpha=1 / len(parts))
        norms += _squared_norm(gradients) / len(parts)
        loss += float(value.detach()) / len(parts)
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient
    return loss, norms, _squared_norm(total)


def noise_scale(part_norms: np.ndarray, batch_norms: np.ndarray, part_rows: int, batch_rows: int) -> float:
    """Rows at which the noise of a gradient is as large as the gradient: tr(covariance of a row) / |true gradient|^2.

    B_simple of McCandlish et al. 2018 (An empirical model of large-batch training, appendix A.1). Both of its unbiased
    estimators are averaged over steps before they are divided.

    Args:
        part_norms, batch_norms: (steps,) what `noisy_backward` returned in each step.
        part_rows, batch_rows: rows of a micro-batch and of the batch.

    Returns:
        The scale, in rows; infinite where no gradient is seen above the noise.
    """
    small, large = float(np.mean(part_norms)), float(np.mean(batch_norms))
    true = (batch_rows * large - part_rows * small) / (batch_rows - part_rows)
    noise = (small - large) / (1 / part_rows - 1 / batch_rows)
    return noise / true if true > 0 else float("inf")


def _squared_norm(tensors: Sequence[Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors))
