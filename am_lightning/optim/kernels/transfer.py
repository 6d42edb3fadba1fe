"""Copies between host and devices: nothing waits, but for numbers that the host is to read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor

_KEPT_VECTORS = 32  # sets of rows whose vectors are kept: more than the calls of step() in a training step


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor`` on ``device``, ready to be read there: a copy to the CPU has arrived, any other does not wait."""
    return tensor.to(device, tensor.dtype if dtype is None else dtype, non_blocking=device.type != "cpu")


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy of a host's tensor that nothing waits for: page-locked memory, which torch frees once it is read."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which the host may give the device nothing."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Constants:
    """Small vectors that stay on a device: the last ones used, and for good all that a CUDA graph reads."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._captured: dict[Hashable, Tensor] = {}

    def vector(self, values: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
        """``[len(values)]`` on the device; read-only, for others get the same tensor.

        Raises:
            RuntimeError: a CUDA graph is being captured, and these values have not been asked for before.
        """
        key, capturing = (values, device, dtype), is_capturing(device)
        vector = self._captured.get(key, self._kept.get(key))
        if vector is None:
            if capturing:
                raise RuntimeError(
                    "a CUDA graph is being captured, and the gradients in it have never stepped together: make a step "
                    "with the same gradients before the capture, as torch's warm-up does"
                )
            vector = upload(torch.tensor(values, dtype=dtype), device)
        if capturing:
            self._captured[key] = vector
        self._kept[key] = vector
        self._kept.move_to_end(key)
        while len(self._kept) > _KEPT_VECTORS:
            self._kept.popitem(last=False)
        return vector
