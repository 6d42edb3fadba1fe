"""Let all ranks of a run fail together, and follow the choice of the first. All ranks call each function."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from am_lightning.pretrain.checkpoints.manifest import HINT
from am_lightning.pretrain.runtime.atomic_files import DISK_FULL, disk_error, write_failure
from am_lightning.pretrain.runtime.errors import RecipeError

_T = TypeVar("_T")


def is_first() -> bool:
    """Return whether this is the first rank of the run, or its only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks, in the order of the ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def decide(function: Callable[[], _T]) -> _T:
    """Call `function` on the first rank, and return its result on all. If it raises an error, all ranks do."""
    found: Any = None
    with together():
        if is_first():
            found = function()
    result: _T = gather(found)[0]
    return result


@contextmanager
def together(path: Path | None = None, part: Path | None = None) -> Iterator[None]:
    """Raise an error of the block on all ranks if it occurs on one, which the others would wait for.

    Args:
        path: the checkpoint that is written, which the error of a disk names; default: the file of the error.
        part: an unfinished folder, which is removed after such an error.

    Raises:
        RecipeError: if the block raises one, if the disk of one rank refuses, or if another rank failed.
    """
    problem: BaseException | None = None
    refused: RecipeError | None = None
    try:
        yield
    except (Exception, CheckpointException) as error:  # the second is a BaseException
        problem, refused = error, error if isinstance(error, RecipeError) else _refusal(path, error)
    text = None if problem is None else str(refused or f"{type(problem).__name__}: {problem}")
    found = [other for other in gather(text) if other is not None]
    if problem is not None and refused is None:
        raise problem
    if found:
        if part is not None and is_first():
            shutil.rmtree(part, ignore_errors=True)  # a full disk needs the space
        raise RecipeError(found[0]) from problem


def _refusal(path: Path | None, problem: BaseException) -> RecipeError | None:
    """Return the error of a disk that refuses, also if it is inside a CheckpointException."""
    failures = problem.failures.values() if isinstance(problem, CheckpointException) else []  # (exception, traceback)
    for cause in (problem, *(failure[0] for failure in failures)):
        refused = disk_error(cause)
        if refused is not None and (refused.errno in DISK_FULL or path is not None):
            return write_failure(path or Path(refused.filename or ".").absolute(), refused, HINT)
    return None
