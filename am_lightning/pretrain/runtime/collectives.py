"""Collective operations of the ranks: they agree on a number, and wait for each other for a limited time."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist


class Agreement:
    """The largest of the numbers that the ranks give at the ends of steps, without a wait of the host for the device.

    On the CPU, and in one process, the answer comes at once. Elsewhere it is copied to the host while the next step is
    computed, and all ranks get it when they ask for the next one.

    Args:
        device: the device of this rank's collectives.
        ranks: the size of torch's default group.
        later: whether to answer one call later. Default: on all devices except a CPU.
    """

    def __init__(self, device: torch.device, ranks: int, later: bool | None = None) -> None:
        self._device, self._ranks = device, ranks
        self._later = device.type != "cpu" if later is None else later
        self._answer: torch.Tensor | None = None  # the number that is being copied to the host
        self._copied: torch.Event | None = None

    def ask(self, mine: int | None, *, now: bool = False) -> int:
        """Return the largest number that a rank gave since the last answer, or 0 if there is no answer yet. Collective.

        Args:
            mine: this rank's number, >= 0; or None, on all ranks, to get only the answer to the call before.
            now: wait for the device and include the numbers of this call; the same on all ranks.
        """
        if self._ranks == 1:
            return mine or 0
        answer = self._read()
        if mine is not None:
            largest = torch.full((), mine, dtype=torch.int32, device=self._device)  # filled there, without a wait
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            self._answer = largest
            if self._later:
                pinned = torch.empty((), dtype=torch.int32, device="cpu", pin_memory=self._device.type == "cuda")
                self._answer = pinned.copy_(largest, non_blocking=True)
                self._copied = torch.get_device_module(self._device).Event()
                self._copied.record()
            if now or not self._later:
                answer = max(answer, self._read())
        return answer

    def _read(self) -> int:
        answer, self._answer = self._answer, None
        if answer is not None and self._copied is not None:
            self._copied.synchronize()
        return 0 if answer is None else int(answer)


def limit_waits(seconds: float | None) -> None:
    """Set the timeout of the collectives of every process group, device meshes' included. None changes nothing."""
    if seconds is not None and dist.is_initialized():
        for group in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
