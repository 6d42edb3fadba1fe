"""Counts of the host's work in a step: operators that it calls, kernels that it launches, and waits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Operators that return a view, or memory that nothing is written to.
_VIEWS = {
    "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "empty_strided", "expand", "lift_fresh",
    "narrow", "new_empty", "new_empty_strided", "permute", "reshape", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "view_as",
}  # fmt: skip
_WAIT = "called a synchronizing CUDA operation"  # the text of torch's warning


def calls_of(step: Callable[[], object], device: torch.device) -> dict[str, int | None]:
    """Return counts of one call of ``step``, which must have been called before.

    Returns:
        ``operations``: operators of torch that no other operator has called, without views. On CUDA also
        ``launches``: kernels that ran on the device, ``copies``: copies and fills there, and ``waits``: warnings of
        torch's synchronization debugging. These are None on other devices.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize()
    events: list[Any] = list(profiler.events() or [])
    found: dict[str, int | None] = {"operations": sum(name not in _VIEWS for name in outer_operators(events))}
    if not cuda:
        return found | dict.fromkeys(("launches", "copies", "waits"))
    ran = [e.name for e in events if e.device_type.name == "CUDA" and not e.name.startswith("Optimizer.")]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in ran)
    return found | {"launches": len(ran) - copies, "copies": copies, "waits": _waits(step)}


def outer_operators(events: Iterable[Any]) -> list[str]:
    """Return the names of torch's operators among a profiler's events that no other operator has called."""
    return [e.name.removeprefix("aten::") for e in events if e.name.startswith("aten::") and not _is_inner(e)]


def _is_inner(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith("aten::"):
            return True
        parent = parent.cpu_parent
    return False


def _waits(step: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(_WAIT in str(warning.message) for warning in caught)
