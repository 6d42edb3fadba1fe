"""Loader processes that stop answering: the run ends with an error instead of waiting for ever.

DataLoader's own timeout does not do it: a batch comes in shared memory, whose file descriptor the main process asks of
the process that made it, and there it waits without a limit when that process is stopped.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from typing import TypeVar

from am_lightning.pretrain.runtime.errors import RESUME, RecipeError

Batch = TypeVar("Batch")


def batches_in_time(batches: Iterator[Batch], timeout_s: float) -> Iterator[Batch]:
    """The batches of a DataLoader with loader processes.

    Args:
        batches: DataLoader's iterator.
        timeout_s: seconds to wait for one.

    Raises:
        RecipeError: there was none for so long. All loader processes have been killed.
    """
    watch = _Watch(timeout_s)
    try:
        while True:
            watch.since = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                watch.since = None
            yield batch
    except (RuntimeError, OSError, EOFError) as error:  # torch's, or of a connection to a process that is killed
        if not watch.fired:
            raise
        raise RecipeError(
            f"a loader process (data.num_workers) gave no batch for {timeout_s:g} s (data.loader_timeout_s): it hangs,"
            f" is stopped, or reads slow storage. {RESUME}; raise data.loader_timeout_s where reading takes so long."
        ) from error
    finally:
        watch.over.set()


class _Watch:
    """A thread that kills the loader processes when the main thread has waited since `since` for too long.

    Only SIGKILL ends one that is stopped; then the main thread gets an error, wherever it waits.
    """

    def __init__(self, timeout_s: float) -> None:
        self.since: float | None = None
        self.fired = False
        self.over = threading.Event()
        self._timeout_s = timeout_s
        threading.Thread(target=self._run, name="loader timeout", daemon=True).start()

    def _run(self) -> None:
        while not self.over.wait(min(1.0, self._timeout_s / 4)):
            since = self.since
            if since is not None and time.monotonic() - since > self._timeout_s:
                self.fired = True
                for process in multiprocessing.active_children():
                    if process.daemon:
                        process.kill()
                return
