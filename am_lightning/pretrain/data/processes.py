"""Run a function on many tasks in several processes, with a progress bar. No process outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

from tqdm import tqdm

from am_lightning.pretrain.runtime.errors import RecipeError

Task = TypeVar("Task")
Result = TypeVar("Result")

_function: Callable[[Any], Any]  # a worker's function, sent once because it may hold a tokenizer


def run_all(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int | None, title: str) -> list[Result]:
    """Return the results of a function, in the order of the tasks.

    Args:
        function: picklable function of a task.
        tasks: picklable tasks.
        workers: number of processes, at most one per task; None: one per core that this process may use. With 1, this
            process does all tasks.
        title: title of the progress bar, which a terminal shows if there is more than one task.

    Raises:
        RecipeError: if a worker was killed. Errors of `function` are raised as they are.
    """
    shown: dict[str, Any] = {"desc": title, "unit": "part", "disable": None if len(tasks) > 1 else True}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, len(tasks))
    if workers <= 1:
        return [function(task) for task in tqdm(tasks, **shown)]
    # spawn: this process may have threads (of a trainer or a tokenizer), which a fork would stop half-way
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start, (function,))
    try:
        return list(tqdm(pool.map(_work, tasks), total=len(tasks), **shown))
    except BrokenProcessPool as error:
        raise RecipeError(
            f"{title}: one of {workers} processes was killed (out of memory?). The same command resumes with what"
            " is not finished; use fewer processes if it happens again."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in a terminal reaches every process and ends it at once
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)  # a killed parent cannot tell its children; unfinished files are ignored


def _work(task: Any) -> Any:
    return _function(task)
