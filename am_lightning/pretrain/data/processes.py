"""The same function on many tasks in several processes, with a progress bar, and no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

from tqdm import tqdm

from am_lightning.pretrain.runtime.errors import RecipeError

Task = TypeVar("Task")
Result = TypeVar("Result")

_function: Callable[[Any], Any] | None = None  # of a worker; sent once, as it may hold a tokenizer


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, title: str) -> list[Result]:
    """`function` of every task, in the order of the tasks.

    Args:
        function: picklable.
        tasks: picklable.
        workers: processes; 1: this one does it all.
        title: of the progress bar, which a terminal sees where there is more than one task.

    Raises:
        RecipeError: a worker was killed, or what `function` raises. What others have finished stays done.
    """
    bar = tqdm(total=len(tasks), desc=title, unit="part", disable=None if len(tasks) > 1 else True)
    with bar:
        if workers <= 1:
            return [_counted(function(task), bar) for task in tasks]
        # spawn: this process may have threads (a trainer's, a tokenizer's), which a fork would freeze half-way
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, _start, (function,))
        try:
            futures = [pool.submit(_work, task) for task in tasks]
            for future in as_completed(futures):
                _counted(future.result(), bar)
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise RecipeError(
                f"{title}: one of {workers} processes was killed (out of memory?). The same command goes on with what"
                " is not finished; use fewer processes if it happens again."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _counted(result: Result, bar: Any) -> Result:
    bar.update()
    return result


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in a terminal reaches every process: end, at once
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)  # a killed parent tells nobody; nothing half-written counts


def _work(task: Any) -> Any:
    assert _function is not None
    return _function(task)
