"""Which rows make up which step: a pure function of (seed, sample index), so that resuming needs one integer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from am_lightning.recipes.errors import RecipeError


class TokenRows(Dataset[torch.Tensor]):
    """Rows of a 1-D token array: row i is tokens [i * seq_len, (i + 1) * seq_len) as an int64 tensor (seq_len,).

    Args:
        tokens: the tokens; memory-mapped is fine.
        seq_len: tokens in a row.
        rows: how many rows, evenly spaced over the array; all of them where None or fewer.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, rows: int | None = None) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        available = len(tokens) // seq_len
        self.starts = np.arange(available) if rows is None or rows >= available else _spaced(available, rows)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> torch.Tensor:
        first = int(self.starts[index]) * self.seq_len
        return torch.from_numpy(self.tokens[first : first + self.seq_len].astype(np.int64))


def _spaced(available: int, rows: int) -> np.ndarray:
    return np.arange(rows) * available // rows


def sample_row(index: int, rows: int, seed: int) -> int:
    """The row that sample `index` of a run is: each pass over the data is its own permutation of all rows."""
    return int(_permutation(rows, seed, index // rows)[index % rows])


_last_permutation: tuple[tuple[int, int, int], np.ndarray] | None = None


def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    global _last_permutation  # one is enough: samples are asked for in order
    key = (rows, seed, epoch)
    if _last_permutation is None or _last_permutation[0] != key:
        _last_permutation = (key, np.random.default_rng([seed, epoch]).permutation(rows))
    return _last_permutation[1]


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
        if batch_size % (world_size * accumulate):
            raise RecipeError(
                f"data.batch_size {batch_size} is not divisible by {world_size} (processes) x {accumulate}"
                f" (trainer.accumulate_grad_batches) = {world_size * accumulate}. It counts the samples of one"
                " optimizer step over all processes: change it or the other two."
            )
        if rows < 1:
            raise RecipeError("the training text is shorter than one row: use more text or a smaller model.seq_len")
        self.rows, self.batch_size, self.steps, self.seed = rows, batch_size, steps, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.first_step = first_step

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.batch_size // self.accumulate
        share = micro // self.world_size
        for first in range(self.first_step() * self.batch_size, self.steps * self.batch_size, micro):
            mine = first + self.rank * share
            yield [sample_row(index, self.rows, self.seed) for index in range(mine, mine + share)]


class ResumableLoader(DataLoader[torch.Tensor]):
    """A DataLoader over a StepOrder.

    The position is the Trainer's global step, which its checkpoints hold; so there is nothing to save here. Lightning
    asks for these two methods to know that a resume in the middle of an epoch is exact.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass
