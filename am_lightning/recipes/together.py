"""What ranks do together: what one raises, all raise; and they leave when all are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch.distributed.checkpoint.api import CheckpointException

from am_lightning.recipes.errors import RecipeError

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def raising_together(
    gather: Callable[[str | None], list[str | None]], refusal_of: Callable[[BaseException], RecipeError | None]
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


def leave_together(accelerator: Accelerator) -> None:
    """The barrier lets gloo's threads free their last tensors: where Python ends before, the process is aborted."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
