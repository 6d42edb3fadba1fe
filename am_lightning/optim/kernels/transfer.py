"""Copies between the host and devices. Only copies to the CPU wait for a device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

_KEPT_VECTORS = 32  # number of vectors that are kept: more than the calls of step() in a training step


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``tensor`` on ``device``. A copy to the CPU waits until it is complete, and no other copy waits."""
    return tensor.to(device, tensor.dtype if dtype is None else dtype, non_blocking=device.type != "cpu")


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to ``device`` without waiting, through pinned memory that torch frees after the copy."""
    if device.type == "cuda" and not is_fake():
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def uploaded(values: Sequence[Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copy Python numbers to ``device`` without waiting, whatever the default device is."""
    return upload(torch.tensor(values, dtype=dtype, device="cpu"), device)


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured, during which the host must not copy to the device."""
    ready = device.type == "cuda" and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(ready and torch.cuda.is_current_stream_capturing())


def refuse_in_capture(param: Tensor) -> None:
    """Refuse to create a state while a CUDA graph is captured, because only replays would fill it with zeros.

    Raises:
        RuntimeError: if a CUDA graph is being captured.
    """
    if is_capturing(param.device):
        raise RuntimeError(
            f"a CUDA graph is being captured, and a parameter of shape {tuple(param.shape)} has no optimizer state "
            "that a step has used: make a step with the same gradients before the capture, as torch's warm-up does"
        )


def is_fake() -> bool:
    """Return whether a FakeTensorMode is active, in which new tensors have a shape but no values."""
    return type(torch.empty(0, device="cpu")) is not Tensor


class Constants:
    """A cache of vectors on devices, and of plans that hold them. Entries that a CUDA graph reads are never dropped."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._captured: dict[Hashable, Any] = {}

    def vector(self, values: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return the values on the device, ``[len(values)]``. Callers must not write to it, because they share it.

        Raises:
            RuntimeError: if a CUDA graph is being captured and the cache does not hold these values.
        """
        vector: Tensor = self.made((values, device, dtype), device, lambda: uploaded(values, device, dtype))
        return vector

    def made(self, key: Hashable, device: torch.device, make: Callable[[], Any]) -> Any:
        """Return the result of ``make``, which is kept under ``key``. Callers must not write to it.

        Raises:
            RuntimeError: if a CUDA graph is being captured and the cache does not hold ``key``.
        """
        capturing = is_capturing(device)
        made = self._captured.get(key, self._kept.get(key))
        if made is None:
            if capturing:
                raise RuntimeError(
                    "a CUDA graph is being captured, and the gradients in it have never stepped together: make a step "
                    "with the same gradients before the capture, as torch's warm-up does"
                )
            made = make()
        if capturing:
            self._captured[key] = made
        self._kept[key] = made
        self._kept.move_to_end(key)
        while len(self._kept) > _KEPT_VECTORS:
            self._kept.popitem(last=False)
        return made
