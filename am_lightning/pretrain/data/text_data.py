"""Rows of tokens for causal language modelling, which can be resumed at every step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Subset

from am_lightning.pretrain.data.litdata_folder import LitdataFolder
from am_lightning.pretrain.data.order import ResumableLoader, StepOrder, TokenRows
from am_lightning.pretrain.data.pipeline import Pipeline
from am_lightning.pretrain.data.shards import Index, Shard, ShardedTokens, read_index
from am_lightning.pretrain.data.tokenizer import check_vocabulary, smallest_vocabulary
from am_lightning.pretrain.runtime.errors import RecipeError, require, require_counts


class TextData(L.LightningDataModule):
    """Documents as rows of `seq_len` tokens, int64 (batch, seq_len). An end-of-text token follows every document.

    In mode "shards" the tokens are written once, into files in `cache_dir`, and `seed` and s alone decide the rows of
    step s (see `order.StepOrder`), for any number of processes. In mode "litdata" the tokens are written into chunks,
    which litdata streams from a folder or an object store in its own order (see `litdata_loader`).

    `val_percent` % of the documents are held out for validation, chosen by a hash of a file's path or a record's text.

    `prepare`, `open`, `train_loader` and `val_loader` do all the work and need no Trainer. Lightning's hooks call them.

    Args:
        source: "stdlib" (source and documents of the running Python); a folder, a file or a glob pattern, where each
            record of .parquet, .jsonl, .jsonl.gz and .json.gz and any other text file is a document; "hf:NAME", which
            datasets.load_dataset streams; or a folder of shards that prepare_data.py made. In mode "litdata" also a
            folder of chunks that it made, or the URL of an uploaded one (s3://..., gs://...).
        source_options: arguments of datasets.load_dataset for "hf:NAME", e.g. {"name": "en", "split": "train"}.
        text_field: field or column of the text in records.
        tokenizer: "bytes", "bpe-N" (trained on the data), a folder, or a name on the Hugging Face hub.
        mode: "shards" or "litdata".
        seq_len: tokens in a row.
        vocab_size: vocabulary of the model, at least that of the tokenizer.
        batch_size: rows per optimizer step, over all processes and micro-batches.
        val_percent: share of the documents that is held out, in percent, in steps of 0.01.
        val_rows: number of rows of a validation during training, evenly spaced over the held-out text.
        final_val_rows: number of rows of the validation after training and of `validate`.
        val_batch_size: number of rows of a validation batch on one process.
        cache_dir: folder of everything that is made. Default: `data` in the run's folder.
        shard_mb: megabytes (2 ** 20 bytes) of text in a work unit, and of tokens in a file.
        prepare_workers: number of processes that make the shards. Default: one per core.
        seed: seed of the order.
        num_workers: number of loader processes per process. Shards, which are memory maps, need none. They download
            the chunks of an object store.
        loader_timeout_s: longest time to wait for a batch of a loader process, in seconds. Then the run fails.

    Attributes:
        scored_rows: number of rows of the last val_loader(), over all processes.
        default_root_dir: the run's folder if there is no Trainer.

    Raises:
        RecipeError: if an argument is out of range. The methods raise it for wrong documents, shards and checkpoints.
    """

    def __init__(
        self,
        source: str = "stdlib",
        source_options: dict[str, Any] | None = None,
        text_field: str = "text",
        tokenizer: str = "bytes",
        mode: str = "shards",
        seq_len: int = 128,
        vocab_size: int = 256,
        batch_size: int = 8,
        val_percent: float = 5.0,
        val_rows: int = 256,
        final_val_rows: int = 1024,
        val_batch_size: int = 64,
        cache_dir: str | None = None,
        shard_mb: int = 64,
        prepare_workers: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        loader_timeout_s: float = 300.0,
    ) -> None:
        super().__init__()
        require_counts("data", batch_size=batch_size, val_rows=val_rows, final_val_rows=final_val_rows)
        require_counts("data", val_batch_size=val_batch_size, shard_mb=shard_mb, prepare_workers=prepare_workers)
        require_counts("data", 2, seq_len=seq_len)
        require_counts("data", 0, num_workers=num_workers, seed=seed)
        require(loader_timeout_s > 0, "data.loader_timeout_s", loader_timeout_s, "> 0")
        require(mode in ("shards", "litdata"), "data.mode", mode, '"shards" or "litdata"')
        if mode == "litdata" and find_spec("litdata") is None:
            raise RecipeError(
                "data.mode litdata needs litdata: pip install 'am-lightning[litdata]', or '.[litdata]' in a checkout"
            )
        check_vocabulary(vocab_size, smallest_vocabulary(tokenizer), tokenizer)
        require(0 < val_percent < 100, "data.val_percent", val_percent, "0 < value < 100")
        self.source, self.source_options, self.text_field = source, source_options, text_field
        self.tokenizer, self.mode, self.seq_len, self.vocab_size = tokenizer, mode, seq_len, vocab_size
        self.batch_size, self.val_percent = batch_size, float(val_percent)
        self.val_rows, self.final_val_rows, self.val_batch_size = val_rows, final_val_rows, val_batch_size
        self.cache_dir, self.shard_mb, self.prepare_workers = cache_dir, shard_mb, prepare_workers
        self.seed, self.num_workers, self.loader_timeout_s = seed, num_workers, loader_timeout_s
        self.scored_rows = 0
        self.default_root_dir = "."
        self._passes: list[list[int]] = []

    def prepare(self, *, check_all: bool = False) -> Index:
        """Make what is missing, or fetch what a run needs of a URL, and check it. Call it on one process per machine.

        Args:
            check_all: compare the checksums of all shards. Otherwise, of more than 2 GiB only the sizes are compared.

        Raises:
            RecipeError: if a document or a shard cannot be read, the disk is full, or the model's vocabulary is too
                small.
        """
        index = self.storage.prepare(check_all=check_all)
        check_vocabulary(self.vocab_size, index.vocab_size, self.tokenizer)
        return index

    def open(self) -> None:
        """Open what `prepare` made, on every process. Raises: RecipeError: if it is missing or does not fit."""
        self.__dict__.pop("_index", None)  # it may have been written again
        check_vocabulary(self.vocab_size, self._index.vocab_size, self.tokenizer)

    def train_loader(
        self,
        *,
        steps: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        first_step: int | Callable[[], int] = 0,
        pin_memory: bool = False,
    ) -> DataLoader[torch.Tensor]:
        """Return the loader of one process's batches: int64 (batch_size / accumulate / world_size, seq_len).

        Args:
            steps: optimizer steps in the whole run. The length is `steps * accumulate`, however many are finished.
            rank, world_size: rank of this process and number of processes, among those that see different data.
            accumulate: micro-batches in a step.
            first_step: number of finished steps, or a function that returns it when iteration begins. Mode "litdata"
                needs `load_state_dict`, too.
            pin_memory: put batches in pinned memory, from which a GPU copies without blocking the host.

        Raises:
            RecipeError: if `batch_size` is not divisible by world_size * accumulate, or the text is too short.
        """
        rows = TokenRows(self._tokens(self._index.train), self.seq_len)
        order = StepOrder(
            len(rows),
            self.batch_size,
            steps,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            accumulate=accumulate,
            first_step=first_step if callable(first_step) else lambda: first_step,
        )
        workers: dict[str, Any] = {"num_workers": self.num_workers, "pin_memory": pin_memory}
        loader: ResumableLoader
        if self.mode == "litdata":
            from am_lightning.pretrain.data.litdata_loader import LitdataLoader

            loader = LitdataLoader(LitdataFolder(self.pipeline), self._index, self._passes, order, **workers)
        else:
            loader = ResumableLoader(rows, batch_sampler=order, persistent_workers=self.num_workers > 0, **workers)
        loader.timeout_s = self.loader_timeout_s
        return loader

    def val_loader(
        self, *, rank: int = 0, world_size: int = 1, rows: int | None = None, pin_memory: bool = False
    ) -> DataLoader[torch.Tensor]:
        """Return the loader of this process's share of the validation rows, evenly spaced over the held-out text.

        Every rank has equally many rows, because collectives need it. `scored_rows` is then their number on all ranks.

        Args:
            rank, world_size: as in `train_loader`.
            rows: number of rows on all ranks. Default: `val_rows`.
            pin_memory: as in `train_loader`.

        Raises:
            RecipeError: if there are fewer rows than processes.
        """
        held_out = TokenRows(self._tokens(self._index.val), self.seq_len)
        rows = min(rows or self.val_rows, len(held_out))
        share = rows // world_size
        if share == 0:
            raise RecipeError(
                f"the validation text has {rows} rows of {self.seq_len} tokens, fewer than the"
                f" {world_size} processes. Raise data.val_percent or data.val_rows, or use more text."
            )
        self.scored_rows = share * world_size
        mine = [number * len(held_out) // rows for number in range(rank, self.scored_rows, world_size)]
        return DataLoader(Subset(held_out, mine), batch_size=self.val_batch_size, pin_memory=pin_memory)

    @functools.cached_property
    def pipeline(self) -> Pipeline:
        """The documents and their shards, as the arguments describe them."""
        root = self.trainer.default_root_dir if self.trainer else self.default_root_dir
        cache = Path(self.cache_dir) if self.cache_dir else Path(root, "data")
        options = {field.name: getattr(self, field.name) for field in fields(Pipeline) if field.name != "cache"}
        return Pipeline(**options, cache=cache)

    @property
    def storage(self) -> Pipeline | LitdataFolder:
        """What makes, checks and names the folder of the shards or chunks."""
        return LitdataFolder(self.pipeline) if self.mode == "litdata" else self.pipeline

    def prepare_data(self) -> None:
        self.prepare()

    def setup(self, stage: str) -> None:
        self.open()

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        trainer = self._trainer()
        if trainer.max_steps < 1:
            raise RecipeError(
                f"trainer.max_steps is {trainer.max_steps}; allowed: >= 1, because the order of the data needs a length"
            )
        return self.train_loader(
            steps=trainer.max_steps,
            accumulate=trainer.accumulate_grad_batches,
            first_step=lambda: trainer.global_step,
            **_place(trainer),
        )

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        trainer = self._trainer()
        rows = self.val_rows if trainer.state.fn == "fit" else self.final_val_rows
        return self.val_loader(rows=rows, **_place(trainer))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with this one and, in mode "litdata", the grids of its passes.

        The values are numbers, strings and lists of them, and equal on every process.
        """
        state: dict[str, Any] = {"mode": self.mode, "tokens_sha256": self._index.sha256}
        state |= {name: getattr(self, name) for name in ("seq_len", "batch_size", "seed")}
        if self.mode == "litdata":
            state["passes"] = [list(entry) for entry in self._passes]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise a RecipeError if the checkpoint was trained on other data or in another order."""
        saved = {"mode": "shards", **state_dict}
        for name, value in self.state_dict().items():
            if name == "passes" or saved.get(name) == value:
                continue
            if name == "tokens_sha256":
                text = f"the checkpoint was trained on another text than {self._folder} holds"
                hint = (
                    "Set data.source, data.tokenizer and data.cache_dir as they were (stdlib: run the same Python), or"
                    " data.source to the folder of its shards"
                )
            else:
                text = f"data.{name} is {value}, the checkpoint was trained with {saved.get(name)}"
                hint = "Set it back"
            raise RecipeError(f"{text}. {hint}, or start a new run in another folder.")
        if self.mode == "litdata":
            self._passes[:] = saved["passes"]

    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError("no Trainer: pass this as trainer.fit(model, datamodule=data), or use train_loader()")
        return self.trainer

    @functools.cached_property
    def _folder(self) -> Path:
        return self.storage.folder()  # reads the files of a tokenizer's folder

    @functools.cached_property
    def _index(self) -> Index:
        return read_index(self._folder, self.storage.index_name)

    def _tokens(self, shards: Sequence[Shard]) -> ShardedTokens:
        return ShardedTokens(self._folder, shards, self._index.dtype)


def _place(trainer: L.Trainer) -> dict[str, Any]:
    """Return arguments of the loaders. Tensor-parallel processes see the same data and have the same rank here."""
    kwargs = trainer.distributed_sampler_kwargs or {}
    return {
        "rank": kwargs.get("rank", trainer.global_rank),
        "world_size": kwargs.get("num_replicas", trainer.world_size),
        "pin_memory": trainer.strategy.root_device.type == "cuda",
    }
