"""Ranks: lets all ranks of a run fail together, and follow the choice of the first."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from am_lightning.pretrain.checkpoints.manifest import HINT
from am_lightning.pretrain.runtime.atomic_files import DISK_FULL, disk_error, write_failure
from am_lightning.pretrain.runtime.collective_errors import raising_together
from am_lightning.pretrain.runtime.errors import RecipeError

_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a Trainer or an Accelerator. Every method is collective: all ranks call it.

    Attributes:
        count: number of ranks.
        first: whether this rank is the first.
    """

    count: int
    first: bool

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in the order of the ranks."""
        if self.count == 1 or not dist.is_initialized():
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def decide(self, function: Callable[[], _T]) -> _T:
        """Call `function` on the first rank, and return its result on all. If it raises an error, all ranks do."""
        found: Any = None
        with raising_together(self.gather):
            if self.first:
                found = function()
        result: _T = self.gather(found)[0]
        return result

    @contextmanager
    def saving(self, path: Path | None = None, part: Path | None = None) -> Iterator[None]:
        """Raise an error of one rank in the block on all ranks.

        Args:
            path: the checkpoint that is written, which the error names; default: the file of the error.
            part: an unfinished folder, which is removed after an error.

        Raises:
            RecipeError: if the disk of one rank refuses, or if another rank failed.
        """
        try:
            with raising_together(self.gather, partial(_refusal, path)):
                yield
        except RecipeError:
            if self.first and part is not None:
                shutil.rmtree(part, ignore_errors=True)  # a full disk needs the space
            raise


def _refusal(path: Path | None, problem: BaseException) -> RecipeError | None:
    """Return the error of a disk that refuses, also if it is inside a CheckpointException."""
    failures = problem.failures.values() if isinstance(problem, CheckpointException) else []  # (exception, traceback)
    for cause in (problem, *(failure[0] for failure in failures)):
        refused = disk_error(cause)
        if refused is not None and (refused.errno in DISK_FULL or path is not None):
            return write_failure(path or Path(refused.filename or ".").absolute(), refused, HINT)
    return None
