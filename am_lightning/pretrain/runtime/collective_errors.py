"""What ranks do together: what one raises, all raise; they agree on a number, and leave when all are done."""

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
    """Collective. An error in the block on one rank ends it on all: the others would wait in the next collective.

    Args:
        gather: one text, or None, from every rank.
        refusal_of: an error that is nobody's fault, such as a full disk, in words for the user; None for others. A
            RecipeError is one as it is.

    Raises:
        RecipeError: where an error was a refusal, or another rank's; else the rank's own error.
    """
    problem: BaseException | None = None
    try:
        yield
    except (Exception, CheckpointException) as error:  # the second is a BaseException
        problem = error
    refused = problem if isinstance(problem, RecipeError) else None
    if problem is not None and refused is None:
        refused = refusal_of(problem)
    words = None if problem is None else str(refused or f"{type(problem).__name__}: {problem}")
    found = [text for text in gather(words) if text is not None]
    if problem is not None and refused is None:
        raise problem
    if found:
        raise RecipeError(found[0]) from problem


class Agreement:
    """What ranks say at the ends of steps, the largest of it known to all; the host does not wait for an accelerator.

    Answers come at once on the CPU and in one process. Elsewhere an answer goes to the host while the next step is
    computed, and is given to the question after; all ranks get it there.

    Args:
        device: of this rank's collectives.
        ranks: how many there are, of torch's default group.
        later: answer one question later; None: on anything but a CPU.
    """

    def __init__(self, device: torch.device, ranks: int, later: bool | None = None) -> None:
        self._device, self._ranks = device, ranks
        self._later = device.type != "cpu" if later is None else later
        self._answer: torch.Tensor | None = None  # on the host, under way
        self._copied: torch.Event | None = None

    def ask(self, mine: int | None, *, now: bool = False) -> int:
        """Collective: the largest number that a rank has said since the last answer, 0 where there is no answer yet.

        Args:
            mine: what this rank says, >= 0; None, on all ranks: nothing, only the answer to the question before.
            now: wait for the device, and answer this question, too; the same on all ranks.
        """
        if self._ranks == 1:
            return mine or 0
        answer = self._read()
        if mine is not None:
            self._say(mine)
            if now or not self._later:
                answer = max(answer, self._read())
        return answer

    def _say(self, mine: int) -> None:
        said = torch.full((), mine, dtype=torch.int32, device=self._device)  # filled there: no copy that waits
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
        if not self._later:
            self._answer = said
            return
        pinned = torch.empty((), dtype=torch.int32, device="cpu", pin_memory=self._device.type == "cuda")
        self._answer = pinned.copy_(said, non_blocking=True)
        self._copied = torch.get_device_module(self._device).Event()
        self._copied.record()

    def _read(self) -> int:
        answer, self._answer = self._answer, None
        if answer is None:
            return 0
        if self._copied is not None:
            self._copied.synchronize()
        return int(answer)


def limit_waits(seconds: float | None) -> None:
    """Give every process group that is there, a device mesh's too, this timeout of its collectives; None: as it is."""
    if seconds is not None and dist.is_initialized():
        for group in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def leave_group() -> None:
    """Collective, where the processes of a run still are one group. The barrier lets gloo's threads free their last
    tensors: where Python ends before, the process is aborted, and torchrun starts all of them again."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
