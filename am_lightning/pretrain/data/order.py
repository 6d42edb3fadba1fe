"""Choose the rows of each step by a pure function of (seed, sample index), so that a resume needs one integer."""

from __future__ import annotations

import math
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from am_lightning.pretrain.data.permutation import sample_rows
from am_lightning.pretrain.data.shards import ShardedTokens
from am_lightning.pretrain.runtime.errors import RESUME, RecipeError


class TokenRows(Dataset[torch.Tensor]):
    """Rows of a 1-D token array. Row i is tokens [i * seq_len, (i + 1) * seq_len) as an int64 tensor (seq_len,).

    Args:
        tokens: the tokens.
        seq_len: tokens in a row.
    """

    def __init__(self, tokens: np.ndarray | ShardedTokens, seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len

    def __len__(self) -> int:
        return len(self.tokens) // self.seq_len

    def __getitem__(self, index: int) -> torch.Tensor:
        first = index * self.seq_len
        return torch.from_numpy(self.tokens[first : first + self.seq_len].astype(np.int64))


def share_of(batch_size: int, world_size: int, accumulate: int) -> int:
    """Return the rows of a process's micro-batch. Raises: RecipeError: if `batch_size` cannot be divided equally."""
    if batch_size % (world_size * accumulate):
        raise RecipeError(
            f"data.batch_size {batch_size} is not divisible by {world_size} (processes with different rows) x"
            f" {accumulate} (trainer.accumulate_grad_batches) = {world_size * accumulate}. It counts the rows of one"
            " optimizer step over all processes: change it or one of the other two."
        )
    return batch_size // (world_size * accumulate)


class StepOrder(Sampler[list[int]]):
    """Batches of row indices for one rank.

    Step s takes the samples [s * batch_size, (s + 1) * batch_size) of the run. They are cut into `accumulate`
    micro-batches and each of these into `world_size` equal shares, so that a change of world size or accumulation
    keeps the samples of every step.

    Args:
        rows: number of rows in the data set.
        batch_size: samples per optimizer step, over all ranks and micro-batches.
        steps: optimizer steps in the whole run. The length is steps * accumulate, however many steps are finished.
        seed: seed of the order.
        rank, world_size: rank and number of the processes that see different data.
        accumulate: micro-batches in a step.
        first_step: function that returns the number of finished steps. It is called when iteration begins.

    Attributes:
        share: rows of a rank in a micro-batch.

    Raises:
        RecipeError: if `batch_size` is not divisible by world_size * accumulate, or there are no rows.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        steps: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        first_step: Callable[[], int] = lambda: 0,
    ) -> None:
        self.share = share_of(batch_size, world_size, accumulate)
        if rows < 1:
            raise RecipeError("the training text is shorter than one row: use more text or a smaller model.seq_len")
        self.rows, self.batch_size, self.steps, self.seed = rows, batch_size, steps, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.first_step = first_step

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.batch_size // self.accumulate
        for first in range(self.first_step() * self.batch_size, self.steps * self.batch_size, micro):
            mine = first + self.rank * self.share
            yield sample_rows(np.arange(mine, mine + self.share), self.rows, self.seed).tolist()


def batches_in_time(batches: Iterator[Any], timeout_s: float) -> Iterator[Any]:
    """Yield the batches of a DataLoader with loader processes, or raise if one takes too long.

    The timeout of DataLoader does not cover a stopped process. A batch comes in shared memory, and the main process
    requests its file descriptor from the process that made it, without a time limit.

    Args:
        batches: iterator of the DataLoader.
        timeout_s: longest time to wait for a batch, in seconds.

    Raises:
        RecipeError: if no batch came in this time. All loader processes have then been killed.
    """
    late = threading.Event()

    def kill() -> None:
        late.set()
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()  # only SIGKILL ends a stopped process; the main thread then gets an error

    try:
        while True:
            timer = threading.Timer(min(timeout_s, threading.TIMEOUT_MAX), kill)
            timer.daemon = True
            timer.start()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                timer.cancel()
            yield batch
    except (RuntimeError, OSError, EOFError) as error:  # errors of torch, or of the connection to a killed process
        if not late.is_set():
            raise
        raise RecipeError(
            f"a loader process (data.num_workers) gave no batch for {timeout_s:g} s (data.loader_timeout_s): it hangs,"
            f" is stopped, or reads slow storage. {RESUME}; raise data.loader_timeout_s if reading takes this long."
        ) from error


class ResumableLoader(DataLoader[torch.Tensor]):
    """A DataLoader whose position is the Trainer's global step.

    Checkpoints hold this step, so there is nothing to save here. Lightning looks for `state_dict` and
    `load_state_dict` to know that a resume in the middle of an epoch is exact.

    Attributes:
        timeout_s: longest time to wait for a batch of a loader process, in seconds.
    """

    timeout_s = math.inf

    def __iter__(self) -> Iterator[torch.Tensor]:  # type: ignore[override]
        batches = super().__iter__()
        return batches_in_time(batches, self.timeout_s) if self.num_workers else batches

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass
