"""Which rows make up which step: a pure function of (seed, sample index), so that resuming needs one integer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from am_lightning.pretrain.data.loader_processes import batches_in_time
from am_lightning.pretrain.data.permutation import sample_rows
from am_lightning.pretrain.data.shards import ShardedTokens
from am_lightning.pretrain.runtime.errors import RecipeError


class TokenRows(Dataset[torch.Tensor]):
    """Rows of a 1-D token array: row i is tokens [i * seq_len, (i + 1) * seq_len) as an int64 tensor (seq_len,).

    Args:
        tokens: the tokens.
        seq_len: tokens in a row.
        rows: how many rows, evenly spaced over the array; all of them where None or fewer.
    """

    def __init__(self, tokens: np.ndarray | ShardedTokens, seq_len: int, rows: int | None = None) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        self.available = len(tokens) // seq_len
        self.rows = self.available if rows is None else min(rows, self.available)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> torch.Tensor:
        first = (index * self.available // self.rows) * self.seq_len
        return torch.from_numpy(self.tokens[first : first + self.seq_len].astype(np.int64))


def share_of(batch_size: int, world_size: int, accumulate: int) -> int:
    """Rows of one process's micro-batch.

    Raises:
        RecipeError: `batch_size` is not divisible by world_size * accumulate.
    """
    if batch_size % (world_size * accumulate):
        raise RecipeError(
            f"data.batch_size {batch_size} is not divisible by {world_size} (processes) x {accumulate}"
            f" (trainer.accumulate_grad_batches) = {world_size * accumulate}. It counts the samples of one"
            " optimizer step over all processes: change it or the other two."
        )
    return batch_size // (world_size * accumulate)


class StepOrder(Sampler[list[int]]):
    """Batches of row indices for one rank.

    Step s takes the samples [s * batch_size, (s + 1) * batch_size) of the run. They are cut into `accumulate`
    micro-batches and each of these into `world_size` equal shares, so a change of world size or accumulation keeps the
    samples of every step.

    Args:
        rows: rows in the data set.
        batch_size: samples per optimizer step, over all ranks and micro-batches.
        steps: optimizer steps in the whole run; the length is steps * accumulate, whatever was done before.
        first_step: called when iteration begins; steps that are done already (the one integer a resume needs).

    Raises:
        RecipeError: `batch_size` is not divisible by world_size * accumulate, or there are no rows.
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
        self.rank, self.accumulate = rank, accumulate
        self.first_step = first_step

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.batch_size // self.accumulate
        for first in range(self.first_step() * self.batch_size, self.steps * self.batch_size, micro):
            mine = first + self.rank * self.share
            yield sample_rows(np.arange(mine, mine + self.share), self.rows, self.seed).tolist()


class ResumableLoader(DataLoader[torch.Tensor]):
    """A DataLoader over a StepOrder.

    The position is the Trainer's global step, which its checkpoints hold; so there is nothing to save here. Lightning
    asks for these two methods to know that a resume in the middle of an epoch is exact.

    Attributes:
        timeout_s: seconds that a batch may take a loader process.
    """

    timeout_s = math.inf

    def __iter__(self) -> Iterator[torch.Tensor]:  # type: ignore[override]
        batches = super().__iter__()
        return batches_in_time(batches, self.timeout_s) if self.num_workers else batches

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass
