"""Load rows of token chunks in litdata's order, from the place where a resumed run begins.

litdata shuffles the chunks of every pass and distributes them to the loader workers of all processes. The rows of a
chunk are shuffled, too. A pass keeps the order of the processes that began it if others resume it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import litdata
import numpy as np
import torch
from litdata.streaming import downloader
from torch.utils.data import default_convert

from am_lightning.pretrain.data.litdata_folder import LitdataFolder, litdata_ranks, storage_options
from am_lightning.pretrain.data.order import ResumableLoader, StepOrder, batches_in_time
from am_lightning.pretrain.data.prepare import only_one
from am_lightning.pretrain.data.shards import Index
from am_lightning.pretrain.runtime.atomic_files import checksum
from am_lightning.pretrain.runtime.errors import RecipeError, first_line

MANY_ROWS = 5_000_000  # rows of a pass
_ROW_BYTES = 150  # memory of a row in litdata's list after a resume on other processes; measured for litdata 0.2.76


class Grid(NamedTuple):
    """The readers of a pass: number of processes, loader workers of each, and rows of a process's micro-batch."""

    world_size: int
    workers: int
    rows: int


class TokensLoader(litdata.TokensLoader):  # type: ignore[misc,unused-ignore]  # litdata requires this name
    """litdata's loader of token rows, which also compares the checksum of a chunk when a process first reads it.

    It returns an error in place of a row, because a DataLoader's worker would wrap a raised one in its traceback.
    """

    def __init__(self, seq_len: int, sha256: Mapping[str, str], source: str) -> None:
        super().__init__(seq_len)
        self.sha256, self.source = sha256, source
        self.checked: set[str] = set()
        self.error: RecipeError | None = None  # the first error, after which every row would wait for its chunk

    def load_item_from_chunk(self, index: int, chunk_index: int, chunk_filepath: str, *args: Any, **kwargs: Any) -> Any:
        name = os.path.basename(chunk_filepath)
        if self.error is None:
            try:
                row = super().load_item_from_chunk(index, chunk_index, chunk_filepath, *args, **kwargs)
                if chunk_filepath not in self.checked:
                    self._check(name, chunk_filepath)
                return row
            except Exception as error:  # an error of the network, the store or the disk, or a wrong checksum
                text = f"cannot read the chunk {name} of data.source {self.source} ({first_line(error)})"
                self.error = error if isinstance(error, RecipeError) else RecipeError(text)
        return self.error

    def delete(self, chunk_index: int, chunk_filepath: str) -> None:
        self.checked.discard(chunk_filepath)
        super().delete(chunk_index, chunk_filepath)

    def _check(self, name: str, path: str) -> None:
        if checksum(Path(path)) == self.sha256[name]:
            self.checked.add(path)
            return
        if "://" in self.source:
            os.remove(path)  # the next start downloads it again
        raise RecipeError(
            f"the chunk {name} of data.source {self.source} is broken: its content does not have the checksum of"
            " chunks.json. Copy it again from an intact folder, then restart."
        )


class LitdataLoader(ResumableLoader):
    """Batches int64 (rows, seq_len) of one process, in litdata's order.

    Args:
        folder: the chunks.
        index: index of the chunks.
        passes: [pass, *grid] of the pass that holds the first step and of the next one, where the grid is the one that
            began the pass. The loader updates this list. A checkpoint needs it and the number of steps.
        order: the steps, the seed and the share of this process. litdata chooses the rows.
        num_workers, pin_memory: as in DataLoader.

    Raises:
        RecipeError: if the text is shorter than one step.
    """

    def __init__(
        self,
        folder: LitdataFolder,
        index: Index,
        passes: list[list[int]],
        order: StepOrder,
        *,
        num_workers: int,
        pin_memory: bool = False,
    ) -> None:
        # These give the length and the batch size, which Lightning's DeepSpeed asks for. litdata reads the rows.
        rows: Any = range(len(order) * order.share)
        super().__init__(rows, batch_size=order.share, collate_fn=default_convert)
        self.folder, self.passes, self.order = folder, passes, order
        self.grid = Grid(order.world_size, max(1, num_workers), order.share)
        self.inner = {"num_workers": num_workers, "pin_memory": pin_memory}
        self.sha256 = {chunk.file: chunk.sha256 for chunk in index.train}
        seq_len = folder.pipeline.seq_len
        self.rows_in_pass = sum(chunk.tokens // seq_len for chunk in index.train)
        self.steps_in_pass = self.rows_in_pass // order.batch_size
        if self.steps_in_pass == 0:
            raise RecipeError(
                f"the training text is shorter than one step of data.batch_size {order.batch_size} rows of {seq_len}"
                " tokens: use more text or smaller steps"
            )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        step = self.order.first_step()
        while step < self.order.steps:
            number, done = divmod(step, self.steps_in_pass)
            until = min(step + self.steps_in_pass - done, self.order.steps)
            batches = iter(self._pass(number, done, self._begin(number, done == 0)))
            if self.inner["num_workers"]:
                batches = batches_in_time(batches, self.timeout_s)
            wanted = (until - step) * self.order.accumulate
            for batch in islice(batches, wanted):
                if isinstance(batch, RecipeError):
                    raise batch
                wanted -= 1
                yield self.collate_fn(batch)
            if wanted:
                raise RuntimeError(f"litdata ended pass {number} {wanted} batches early: please report it")
            step = until

    def _begin(self, number: int, fresh: bool) -> Grid:
        """Return the grid that decides the order of pass `number`: that of this run, unless another began it."""
        known = [entry for entry in self.passes if entry[0] <= number - fresh][-1:]
        if not fresh and not known:
            raise RecipeError(
                "data.mode litdata cannot begin in the middle of a pass without the data's state: resume from a"
                " checkpoint that was saved with data.mode litdata (without a Trainer: load_state_dict)"
            )
        self.passes[:] = [*known, [number + (not fresh), *self.grid]]
        return self.grid if fresh else Grid(*known[0][1:])

    def _pass(self, number: int, done: int, began: Grid) -> litdata.StreamingDataLoader:
        """Return the loader of pass `number` after its first `done` steps."""
        options = self.folder.pipeline
        source = options.source if self.folder.is_remote else str(self.folder.folder())
        os.environ.setdefault("LITDATA_POSIX_MAX_WORKERS", "0")  # it would give processes different numbers of workers
        if os.environ.get("AWS_ALLOW_HTTP") == "true":  # a variable of obstore that litdata does not pass on
            downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
        # One process after the other: litdata gives up if another process downloads the index for more than 1 s.
        in_turn = only_one(options.cache) if self.folder.is_remote else nullcontext()
        with litdata_ranks(self.order.rank, self.grid.world_size):
            with in_turn:
                try:
                    dataset = litdata.StreamingDataset(
                        source,
                        cache_dir=str(options.cache),
                        item_loader=TokensLoader(options.seq_len, self.sha256, source),
                        shuffle=True,
                        seed=self.order.seed % 2**32,
                        item_shuffle_window=0,  # shuffle all rows of a chunk
                        storage_options=storage_options(source),
                    )
                except (TypeError, AttributeError):  # another version of litdata
                    raise
                except Exception as error:  # an error of the network, the store or the disk
                    raise RecipeError(f"data.source {source}: litdata cannot open it ({first_line(error)})") from error
            dataset.set_drop_last(False)  # more workers would drop more rows; `wanted` is equal on all processes
            if dataset.posix_fast is not None:  # a parallel file system would have another order
                dataset.posix_fast = replace(dataset.posix_fast, kind="posix")
            loader = litdata.StreamingDataLoader(dataset, batch_size=self.grid.rows, collate_fn=_stacked, **self.inner)
            loader.current_epoch = number
            if done:
                loader.load_state_dict(self._state(loader.state_dict(), number, done, began))
        return loader

    def _state(self, state: dict[str, Any], number: int, done: int, began: Grid) -> dict[str, Any]:
        """Return litdata's `state` of an unused loader, changed to begin after the first `done` steps of a pass."""
        rows, workers, world_size = self.grid.rows, self.grid.workers, self.grid.world_size
        batches = done * self.order.accumulate
        same = began == self.grid
        place: dict[str, int | str] = {
            "current_epoch": number + 1,
            # 0 if the grid has changed: litdata then distributes the remaining rows of the pass again
            "num_samples_yielded": batches * rows if same else 0,
            "sample_in_epoch": batches * rows * world_size,
            "initial_world_size": began.world_size,
            "initial_num_workers": began.workers,
            "initial_batch_size": began.rows,
        }
        if not same:
            place |= {"world_size": began.world_size, "num_workers": began.workers, "batch_size": began.rows}
            place["resume_mode"] = "elastic"
            if self.order.rank == 0 and self.rows_in_pass > MANY_ROWS:
                warnings.warn(
                    f"data.mode litdata: until this pass ends, every loader process keeps a list of its"
                    f" {self.rows_in_pass:,} rows (about {self.rows_in_pass * _ROW_BYTES / 1e9:.1f} GB), because the"
                    f" pass was begun by {began.world_size} x {began.workers} loader processes with micro-batches of"
                    f" {began.rows} rows. As many as these need no list",
                    stacklevel=2,
                )
        return {
            "dataset": state["dataset"] | place,
            "current_epoch": number + 1,
            "num_samples_yielded": place["num_samples_yielded"],
            "latest_worker_idx": (batches - 1) % workers,
        }


def _stacked(rows: list[Any]) -> torch.Tensor | RecipeError:
    errors = [row for row in rows if isinstance(row, RecipeError)]
    return errors[0] if errors else torch.from_numpy(np.stack(rows).astype(np.int64))
