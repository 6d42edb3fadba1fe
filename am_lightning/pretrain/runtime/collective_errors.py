"""Collective operations of the ranks: an error of one is raised by all, and all agree on a number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from am_lightning.pretrain.runtime.errors import RecipeError


@contextmanager
def raising_together(
    gather: Callable[[str | None], list[str | None]],
    refusal_of: Callable[[BaseException], RecipeError | None] = lambda problem: None,
) -> Iterator[None]:
    """Raise an error of the block on all ranks if it occurs on one, which the others would wait for. Collective.

    Args:
        gather: collects one text, or None, from every rank.
        refusal_of: turns an error that is not a bug, such as a full disk, into a RecipeError; returns None for others.

    Raises:
        RecipeError: if the error is a RecipeError or has been turned into one, or if another rank failed.
    """
    problem: BaseException | None = None
    refused: RecipeError | None = None
    try:
        yield
    except (Exception, CheckpointException) as error:  # the second is a BaseException
        problem, refused = error, error if isinstance(error, RecipeError) else refusal_of(error)
    text = None if problem is None else str(refused or f"{type(problem).__name__}: {problem}")
    found = [other for other in gather(text) if other is not None]
    if problem is not None and refused is None:
        raise problem
    if found:
        raise RecipeError(found[0]) from problem


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
        self._answer: torch.Tensor | None = None  # on its way to the host
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
            self._send(mine)
            if now or not self._later:
                answer = max(answer, self._read())
        return answer

    def _send(self, mine: int) -> None:
        largest = torch.full((), mine, dtype=torch.int32, device=self._device)  # filled there: no copy that waits
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        self._answer = largest
        if self._later:
            pinned = torch.empty((), dtype=torch.int32, device="cpu", pin_memory=self._device.type == "cuda")
            self._answer = pinned.copy_(largest, non_blocking=True)
            self._copied = torch.get_device_module(self._device).Event()
            self._copied.record()

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
