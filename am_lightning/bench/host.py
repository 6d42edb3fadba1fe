"""What a step asks of the host: operations that it calls, kernels that it launches, times that it waits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that make a view, or memory that nothing is written to.
_VIEWS = {
    "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "empty_strided", "expand", "lift_fresh",
    "narrow", "new_empty", "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes", "squeeze",
    "t", "transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
}  # fmt: skip


def calls_of(step: Callable[[], None], device: torch.device) -> dict[str, int | None]:
    """Counts of one call of ``step``, which has been called before.

    Returns:
        ``operations``: torch's operators called, without views. On CUDA ``launches``: kernels that ran on the device,
        ``copies``: copies and fills there, and ``waits``: calls that torch's synchronization debugging warned of;
        elsewhere None.
    """
    with _Operations() as counted:
        step()
    found: dict[str, int | None] = {"operations": counted.total, "launches": None, "copies": None, "waits": None}
    if device.type == "cuda":
        found["waits"] = _waits(step)
        found["launches"], found["copies"] = _launches(step)
    return found


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += func.overloadpacket.__name__ not in _VIEWS
        return func(*args, **(kwargs or {}))


def _waits(step: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def _launches(step: Callable[[], None]) -> tuple[int, int]:
    """Kernels, and copies and fills."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() or [] if event.device_type.name == "CUDA"]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return len(names) - copies, copies
