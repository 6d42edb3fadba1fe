"""Copies between host and devices. Only copies to the CPU wait."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

_KEPT_VECTORS = 32  # sets of rows whose vectors are kept: more than the calls of step() in a training step


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor`` on ``device``, ready to be read there: a copy to the CPU has arrived, any other does not wait."""
    return tensor.to(device, tensor.dtype if dtype is None else dtype, non_blocking=device.type != "cpu")


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy of a host's tensor that nothing waits for: page-locked memory, which torch frees once it is read."""
    if device.type == "cuda" and not is_fake():
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def uploaded(values: Sequence[Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """``upload`` of the host's numbers, whatever the default device is."""
    return upload(torch.tensor(values, dtype=dtype, device="cpu"), device)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which the host may give the device nothing."""
    ready = device.type == "cuda" and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(ready and torch.cuda.is_current_stream_capturing())


def refuse_in_capture(param: Tensor) -> None:
    """The zeros of a state that is made in a CUDA graph's capture are recorded, and filled at replays only.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if is_capturing(param.device):
        raise RuntimeError(
            f"a CUDA graph is being captured, and a parameter of shape {tuple(param.shape)} in it has no optimizer "
            "state that a step has used: make a step with the same gradients before it, as torch's warm-up does"
        )


def is_fake() -> bool:
    """Whether a FakeTensorMode is active, in which every new tensor has a shape, and no number that can be read."""
    return type(torch.empty(0, device="cpu")) is not Tensor


class Constants:
    """Vectors and plans made of them that stay on a device: the last used, and for good what a CUDA graph reads."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._captured: dict[Hashable, Any] = {}

    def vector(self, values: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
        """``[len(values)]`` on the device. It is read-only, because other callers get the same tensor.

        Raises:
            RuntimeError: a CUDA graph is being captured, and these values have not been asked for before.
        """
        vector: Tensor = self.made((values, device, dtype), device, lambda: uploaded(values, device, dtype))
        return vector

    def made(self, key: Hashable, device: torch.device, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, kept under ``key``; read-only.

        Raises:
            RuntimeError: as ``vector``.
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
