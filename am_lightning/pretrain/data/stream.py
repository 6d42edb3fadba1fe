"""Rows straight from the documents, without shards: every reader has its own documents and knows where it is.

The parts of the data set (see `prepare.work_units`) are shuffled anew for every pass; documents inside a part come in
their order. There is no shuffle buffer, whose content a resumed run could not have again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from am_lightning.pretrain.data.permutation import sample_rows
from am_lightning.pretrain.data.prepare import WorkUnit
from am_lightning.pretrain.data.tokenizer import Tokenizer, encode_all
from am_lightning.pretrain.runtime.errors import RecipeError


class Position(NamedTuple):
    """Where a reader's next row begins: plain numbers, so that a checkpoint can hold them.

    Attributes:
        part: how many parts this reader has finished.
        document: how many documents of the part come before, held-out ones counted.
        token: how many tokens of the document come before.
    """

    part: int = 0
    document: int = 0
    token: int = 0


@dataclass(frozen=True)
class Reader:
    """The rows of one of `readers` readers, which together read every part once in each pass.

    Attributes:
        parts: of the data set.
        tokenizer: of the documents.
        val_percent: share of the documents that is held out, and passed over here.
        seq_len: tokens in a row.
        seed: of the order of the parts.
        number, readers: this reader, and how many there are.
    """

    parts: tuple[WorkUnit, ...]
    tokenizer: Tokenizer
    val_percent: float
    seq_len: int
    seed: int
    number: int
    readers: int

    def rows(self, start: Position) -> Iterator[tuple[np.ndarray, Position]]:
        """Without end, rows of tokens from `start` on, each with the position behind it.

        Raises:
            RecipeError: a document cannot be read, or a whole pass has no text.
        """
        waiting: deque[tuple[Position, np.ndarray]] = deque()
        ready = 0
        for position, tokens in self._documents(start):
            waiting.append((position, tokens))
            ready += len(tokens)
            while ready >= self.seq_len:
                row = _take(waiting, self.seq_len)
                ready -= self.seq_len
                behind = waiting[0][0] if waiting else Position(position.part, position.document + 1)
                yield row, behind

    def _documents(self, start: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """Each with its end-of-text token, from the token of `start` on."""
        part, document, token = start
        last_with_text = part
        while part - last_with_text <= 2 * len(self.parts):  # at most so many between the same one in two passes
            for number, tokens in encode_all(self.tokenizer, self._training_texts(part, document)):
                last_with_text = part
                yield Position(part, number, token), tokens[token:]
                token = 0
            part, document, token = part + 1, 0, 0
        raise RecipeError("a whole pass over data.source gave no text to train on: look at it and at data.val_percent")

    def _training_texts(self, part: int, first: int) -> Iterator[tuple[int, bytes]]:
        """Those of a part from document `first` on, each with its number in the part."""
        slot = self.number + part * self.readers
        chosen = self.parts[int(sample_rows(np.array([slot]), len(self.parts), self.seed)[0])]
        for number, document in enumerate(chosen.documents()):
            if number >= first and not document.is_validation(self.val_percent):
                yield number, document.text


def _take(waiting: deque[tuple[Position, np.ndarray]], count: int) -> np.ndarray:
    """Remove `count` tokens from the front."""
    found = []
    while count:
        position, tokens = waiting.popleft()
        found.append(tokens[:count])
        if len(tokens) > count:
            waiting.appendleft((position._replace(token=position.token + count), tokens[count:]))
        count -= len(found[-1])
    return np.concatenate(found)


class StreamBatches(Dataset[tuple[torch.Tensor, Position] | RecipeError]):
    """Batch b is the next one of reader b % len(readers), with the position behind it; or why there is none.

    A DataLoader gives the batches to its workers in turn, so with as many readers as workers each reader lives in one
    process. Asked for in another order it would give something else.

    Args:
        readers: of this process.
        rows: in a batch.
    """

    def __init__(self, readers: Sequence[Reader], rows: int) -> None:
        self.readers, self.rows = list(readers), rows
        self.start = [Position()] * len(self.readers)
        self._open: dict[int, Iterator[tuple[np.ndarray, Position]]] = {}

    def begin(self, start: Sequence[Position]) -> None:
        """Go on from these positions, one for each reader."""
        self.start, self._open = list(start), {}

    def __getitem__(self, number: int) -> tuple[torch.Tensor, Position] | RecipeError:
        reader = number % len(self.readers)
        if reader not in self._open:
            self._open[reader] = self.readers[reader].rows(self.start[reader])
        try:
            found = [next(self._open[reader]) for _ in range(self.rows)]
        except RecipeError as error:  # raised here, a DataLoader's worker would wrap it in its traceback
            return error
        return torch.from_numpy(np.stack([row for row, _ in found]).astype(np.int64)), found[-1][1]


class _Numbers(Sampler[int]):
    """The batches that are left; the length is that of the whole run."""

    def __init__(self, total: int) -> None:
        self.total, self.first = total, 0

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.total))


class StreamLoader(DataLoader[Any]):
    """Batches int64 (rows, seq_len) of one process's readers, and the positions behind every step.

    Args:
        batches: of this process.
        steps: optimizer steps in the whole run; the length is steps * accumulate.
        accumulate: micro-batches in a step.
        num_workers: loader processes: none, or one for each reader.
        first_step: called when iteration begins; steps that are done already.
        resume: gives the positions behind a step.
        pin_memory: as DataLoader's.
    """

    def __init__(
        self,
        batches: StreamBatches,
        steps: int,
        accumulate: int,
        num_workers: int,
        first_step: Callable[[], int],
        resume: Callable[[int], list[Position]],
        pin_memory: bool = False,
    ) -> None:
        self.numbers = _Numbers(steps * accumulate)
        super().__init__(
            batches,
            batch_size=None,
            sampler=self.numbers,
            num_workers=num_workers,
            collate_fn=_unchanged,
            pin_memory=pin_memory,
        )
        self.batches, self.accumulate, self.first_step, self.resume = batches, accumulate, first_step, resume
        # Behind the last two steps that were handed out: whoever saves may have taken the last one or not.
        self.positions: dict[int, list[Position]] = {}

    def __iter__(self) -> Iterator[torch.Tensor]:  # type: ignore[override]
        step = self.first_step()
        positions = self.resume(step)
        self.positions = {step: positions}
        self.batches.begin(positions)
        self.numbers.first = step * self.accumulate
        for number, item in enumerate(super().__iter__(), self.numbers.first):
            if isinstance(item, RecipeError):
                raise item
            batch, behind = item
            positions = list(positions)
            positions[number % len(positions)] = behind
            done, rest = divmod(number + 1, self.accumulate)
            if rest == 0:
                self.positions = {k: v for k, v in self.positions.items() if k == done - 1} | {done: positions}
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: Lightning would keep rank 0's alone. TextData gathers every rank's positions."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def make_readers(template: Reader, *, rank: int, world_size: int, workers: int) -> list[Reader]:
    """The readers of one process: one for each of its loader processes.

    Raises:
        RecipeError: there are fewer parts than readers.
    """
    each = max(1, workers)
    if len(template.parts) < world_size * each:
        raise RecipeError(
            f"data.source has {len(template.parts)} parts, fewer than {world_size} (processes) x {each} (readers in"
            " each) can share. Lower data.num_workers or data.shard_mb, or prepare shards (data.mode shards)."
        )
    return [replace(template, number=rank * each + i, readers=world_size * each) for i in range(each)]


def _unchanged(batch: Any) -> Any:
    return batch
