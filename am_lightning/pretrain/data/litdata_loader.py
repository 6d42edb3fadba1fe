"""Rows of token chunks that litdata streams: its order, and where a resumed run begins in it.

litdata shuffles the chunks of every pass and deals them to processes and their loader workers; the rows of a chunk are
shuffled, too. A pass that was begun keeps the order of its first processes when others resume it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import litdata
import numpy as np
import torch
from litdata.streaming import downloader
from torch.utils.data import DataLoader

from am_lightning.pretrain.data.litdata_folder import litdata_ranks
from am_lightning.pretrain.data.shards import checksum
from am_lightning.pretrain.runtime.errors import RecipeError, first_line


class Grid(NamedTuple):
    """Who reads a pass: the processes, the loader workers of each, the rows of a micro-batch of one process."""

    world_size: int
    workers: int
    rows: int


@dataclass(frozen=True)
class Chunks:
    """What litdata is told about the data.

    Attributes:
        source: a folder or a URL.
        cache: folder of chunks that are downloaded.
        sha256: of each chunk, by its name.
        steps: optimizer steps in a pass.
        seq_len: tokens in a row.
        seed: of the order.
    """

    source: str
    cache: Path
    sha256: Mapping[str, str]
    steps: int
    seq_len: int
    seed: int


class TokensLoader(litdata.TokensLoader):  # type: ignore[misc,unused-ignore]  # litdata looks for this very name
    """litdata's, which also compares the checksum of a chunk when this process first reads it.

    Gives an error in place of the row: raised here, a DataLoader's worker would wrap it in its traceback.
    """

    def __init__(self, seq_len: int, sha256: Mapping[str, str], source: str) -> None:
        super().__init__(seq_len)
        self.sha256, self.source = sha256, source
        self.checked: set[str] = set()
        self.error: RecipeError | None = None  # the first one: each of the rows behind it would wait for its chunk

    def load_item_from_chunk(self, index: int, chunk_index: int, chunk_filepath: str, *args: Any, **kwargs: Any) -> Any:
        name = os.path.basename(chunk_filepath)
        if self.error is None:
            try:
                row = super().load_item_from_chunk(index, chunk_index, chunk_filepath, *args, **kwargs)
                if chunk_filepath not in self.checked:
                    self._check(name, chunk_filepath)
                    self.checked.add(chunk_filepath)
                return row
            except RecipeError as error:
                self.error = error
            except Exception as error:  # the network's, the store's, the disk's
                text = f"cannot read the chunk {name} of data.source {self.source} ({first_line(error)})"
                self.error = RecipeError(text)
        return self.error

    def delete(self, chunk_index: int, chunk_filepath: str) -> None:
        self.checked.discard(chunk_filepath)
        super().delete(chunk_index, chunk_filepath)

    def _check(self, name: str, path: str) -> None:
        if checksum(Path(path)) == self.sha256[name]:
            return
        if "://" in self.source:
            os.remove(path)  # the next start downloads it anew
        raise RecipeError(
            f"the chunk {name} of data.source {self.source} is broken: its content does not have the checksum that"
            " chunks.json says. Copy it anew from where it is whole, and start again."
        )


class LitdataLoader(DataLoader[Any]):
    """Batches int64 (rows, seq_len) of one process, in litdata's order.

    Args:
        chunks: the data.
        passes: [pass, *grid] of those that began the pass of the first step and of those that begin the next; kept up
            to date. All that a checkpoint must hold beside the number of steps.
        grid: this run's.
        rank: of this process.
        steps: optimizer steps in the whole run; the length is steps * accumulate.
        accumulate: micro-batches in a step.
        first_step: called when iteration begins; steps that are done already.
        num_workers: loader processes.
        pin_memory: as DataLoader's.
    """

    def __init__(
        self,
        chunks: Chunks,
        passes: list[list[int]],
        grid: Grid,
        *,
        rank: int,
        steps: int,
        accumulate: int,
        first_step: Callable[[], int],
        num_workers: int,
        pin_memory: bool = False,
    ) -> None:
        # the length and the batch_size, which Lightning's DeepSpeed asks for; what is read is litdata's
        super().__init__(range(steps * accumulate * grid.rows), batch_size=grid.rows, collate_fn=_unchanged)  # type: ignore[arg-type]
        self.chunks, self.passes, self.grid, self.rank = chunks, passes, grid, rank
        self.steps, self.accumulate, self.first_step = steps, accumulate, first_step
        self.inner = {"num_workers": num_workers, "pin_memory": pin_memory}

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        step = self.first_step()
        while step < self.steps:
            number, done = divmod(step, self.chunks.steps)
            until = min(step + self.chunks.steps - done, self.steps)
            began = self._begin(number, done == 0)
            wanted = (until - step) * self.accumulate
            for batch in islice(self._pass(number, done, began), wanted):
                if isinstance(batch, RecipeError):
                    raise batch
                wanted -= 1
                yield self.collate_fn(batch)
            if wanted:
                raise RuntimeError(f"litdata ended pass {number} {wanted} batches early: please report it")
            step = until

    def _begin(self, number: int, fresh: bool) -> Grid:
        """The grid whose order pass `number` has: this run's, unless another began it."""
        known = [entry for entry in self.passes if entry[0] <= number - fresh][-1:]
        if not fresh and not known:
            raise RecipeError(
                "data.mode litdata cannot begin in the middle of a pass without the data's state: resume from a"
                " checkpoint that was saved with data.mode litdata (without a Trainer: load_state_dict)"
            )
        self.passes[:] = [*known, [number + (not fresh), *self.grid]]
        return self.grid if fresh else Grid(*known[0][1:])

    def state_dict(self) -> dict[str, Any]:
        """Nothing: TextData has it. Lightning asks for it to know that a resume in the middle of a pass is exact."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def _pass(self, number: int, done: int, began: Grid) -> litdata.StreamingDataLoader:
        """Pass `number` of the data, behind its first `done` steps."""
        chunks, rows = self.chunks, self.grid.rows
        os.environ.setdefault("LITDATA_POSIX_MAX_WORKERS", "0")  # it would give processes unlike numbers of workers
        if os.environ.get("AWS_ALLOW_HTTP") == "true":  # obstore's own variable, which litdata does not pass on
            downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
        with litdata_ranks(self.rank, self.grid.world_size):
            dataset = litdata.StreamingDataset(
                chunks.source,
                cache_dir=str(chunks.cache),
                item_loader=TokensLoader(chunks.seq_len, chunks.sha256, chunks.source),
                shuffle=True,
                seed=chunks.seed % 2**32,
                item_shuffle_window=0,  # all rows of a chunk
            )
            dataset.set_drop_last(False)  # it would drop more for more workers; `wanted` is the same for all processes
            if dataset.posix_fast is not None:  # a parallel file system would have another order, not resumed exactly
                dataset.posix_fast = replace(dataset.posix_fast, kind="posix")
            loader = litdata.StreamingDataLoader(dataset, batch_size=rows, collate_fn=_stacked, **self.inner)
            loader.current_epoch = number
            if done:
                loader.load_state_dict(self._state(loader.state_dict(), number, done, began))
        return loader

    def _state(self, state: dict[str, Any], number: int, done: int, began: Grid) -> dict[str, Any]:
        """litdata's `state` of a loader that has given nothing, with the place that the loader is to begin at."""
        rows, workers, world_size = self.grid.rows, self.grid.workers, self.grid.world_size
        batches = done * self.accumulate
        same = began == self.grid
        place: dict[str, int | str] = {
            "current_epoch": number + 1,
            # of this process, where the grid is the same; otherwise litdata deals the rest of the order out anew
            "num_samples_yielded": batches * rows if same else 0,
            "sample_in_epoch": batches * rows * world_size,
            "initial_world_size": began.world_size,
            "initial_num_workers": began.workers,
            "initial_batch_size": began.rows,
        }
        if not same:
            place |= {"world_size": began.world_size, "num_workers": began.workers, "batch_size": began.rows}
            place["resume_mode"] = "elastic"
        return {
            "dataset": state["dataset"] | place,
            "current_epoch": number + 1,
            "num_samples_yielded": place["num_samples_yielded"],
            "latest_worker_idx": (batches - 1) % workers,
        }


def _stacked(rows: list[Any]) -> torch.Tensor | RecipeError:
    errors = [row for row in rows if isinstance(row, RecipeError)]
    return errors[0] if errors else torch.from_numpy(np.stack(rows).astype(np.int64))


def _unchanged(batch: Any) -> Any:
    return batch
