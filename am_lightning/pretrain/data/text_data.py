"""TextData: rows of tokens for causal language modelling, resumable at every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Subset

from am_lightning.pretrain.data.litdata_folder import CHUNKS, LitdataFolder, require_litdata
from am_lightning.pretrain.data.order import ResumableLoader, StepOrder, TokenRows, share_of
from am_lightning.pretrain.data.pipeline import Pipeline
from am_lightning.pretrain.data.prepare import is_complete
from am_lightning.pretrain.data.shards import Index, TokenShards, open_shards
from am_lightning.pretrain.data.tokenizer import check_vocabulary, smallest_vocabulary
from am_lightning.pretrain.runtime.errors import RecipeError, require, require_counts

if TYPE_CHECKING:
    from am_lightning.pretrain.data.litdata_loader import LitdataLoader


class TextData(L.LightningDataModule):
    """Documents -> tokens, an end-of-text token after each -> rows of `seq_len` tokens, int64 (batch, seq_len).

    `mode` "shards": the tokens are made once, into files in `cache_dir`, and which rows make up step s depends on
    `seed` and s alone (see `order.StepOrder`), for any number of processes. "litdata": the tokens are made into chunks,
    which litdata streams from a folder or an object store, in its order (see `litdata_loader`).

    A fixed `val_percent` % of the documents is held out for validation, by a hash of their path or, in records, text.

    All work is in `prepare`, `open`, `train_loader` and `val_loader`, which need no Trainer; Lightning's hooks call
    them.

    Args:
        source: "stdlib" (the running Python's own source and documents); a folder, a file or a glob pattern, where
            .parquet, .jsonl, .jsonl.gz and .json.gz hold a document in each record and any other text file is one;
            "hf:NAME", which datasets.load_dataset streams; or a folder of shards that prepare_data.py made; in mode
            "litdata" also a folder of chunks that it made, or where that was uploaded (s3://..., gs://...).
        source_options: arguments of datasets.load_dataset for "hf:NAME", e.g. {"name": "en", "split": "train"}.
        text_field: field or column of the text in records.
        tokenizer: "bytes"; "bpe-N", trained on the data; a folder, or a name on the Hugging Face hub.
        mode: "shards" or "litdata".
        seq_len: tokens in a row.
        vocab_size: the model's; at least the tokenizer's.
        batch_size: rows per optimizer step, over all processes and micro-batches.
        val_percent: share of the documents held out, in percent; steps of 0.01.
        val_rows: rows of a validation during training, evenly spaced over the held-out text.
        final_val_rows: rows of the validation after training (and of `validate`).
        val_batch_size: rows of a validation batch on one process.
        cache_dir: folder of what is made; None: `data` below the run's folder.
        shard_mb: megabytes of text that are tokenized in one go, and of tokens in a file.
        prepare_workers: processes that make the shards; None: one for every core.
        seed: of the order.
        num_workers: loader processes on every process. Shards are memory maps, which need none; chunks of an object
            store are downloaded by them.
        loader_timeout_s: seconds that training waits for a batch of a loader process (shards); then the run fails.

    Attributes:
        scored_rows: of the last val_loader(), over all processes.
        default_root_dir: the run's folder; a Trainer's own comes first.

    Raises:
        RecipeError: an argument is out of range. The methods raise it for documents, shards and checkpoints that do not
            fit.
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
        require(
            mode in ("shards", "litdata"),
            "data.mode",
            mode,
            '"shards" or "litdata"' + (", which took the place of stream" if mode == "stream" else ""),
        )
        if mode == "litdata":
            require_litdata()
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
        self._pipeline: Pipeline | None = None
        self._shards: TokenShards | None = None
        self._passes: list[list[int]] = []

    def prepare(self, *, check_all: bool = False) -> Index:
        """On one process of every machine: make what is not there yet, or fetch what is needed at once of a URL.

        Args:
            check_all: compare the checksums of all shards. Otherwise those of more than 2 GiB are only looked at.

        Raises:
            RecipeError: a document or a shard cannot be read, the disk is full, or the model's vocabulary is too small.
        """
        if self._litdata is not None:
            return self._litdata.prepare(check_all=check_all)
        if (Path(self.source).expanduser() / CHUNKS).exists():
            raise RecipeError(f"data.source {self.source} is a folder of litdata chunks: set data.mode litdata")
        return self.pipeline().prepare(check_all=check_all)

    def open(self) -> None:
        """On every process, after `prepare`: open what it made.

        Raises:
            RecipeError: it is not there, or the model's vocabulary is too small.
        """
        self._shards = open_shards(self.folder()) if self._litdata is None else self._litdata.open()
        check_vocabulary(self.vocab_size, self._shards.index.vocab_size, self.tokenizer)

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
        """Batches of one process: int64 (batch_size / accumulate / world_size, seq_len).

        Args:
            steps: optimizer steps in the whole run. The length is `steps * accumulate`, whatever was done before.
            rank, world_size: this process and how many there are (that see different data).
            accumulate: micro-batches in a step.
            first_step: steps that are done already; a function is called when iteration begins. "litdata" needs
                `load_state_dict`, too.
            pin_memory: batches in pinned memory, from which a GPU copies without the host's waiting.

        Raises:
            RecipeError: `batch_size` is not divisible by world_size * accumulate, or the text is too short.
        """
        done = first_step if callable(first_step) else lambda: first_step
        if self._litdata is not None:
            return self._chunk_loader(steps, rank, world_size, accumulate, done, pin_memory)
        rows = TokenRows(self._opened().train, self.seq_len)
        order = StepOrder(
            len(rows),
            self.batch_size,
            steps,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            accumulate=accumulate,
            first_step=done,
        )
        loader = ResumableLoader(
            rows,
            batch_sampler=order,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=pin_memory,
        )
        loader.timeout_s = self.loader_timeout_s
        return loader

    def val_loader(
        self, *, rank: int = 0, world_size: int = 1, rows: int | None = None, pin_memory: bool = False
    ) -> DataLoader[torch.Tensor]:
        """This process's share of `rows` held-out rows (`val_rows` where None), evenly spaced over the held-out text.

        Every rank has equally many, as collectives need; `scored_rows` then says how many all have together.

        Raises:
            RecipeError: there are fewer rows than processes.
        """
        held_out = TokenRows(self._opened().val, self.seq_len, rows or self.val_rows)
        share = len(held_out) // world_size
        if share == 0:
            raise RecipeError(
                f"the validation text has {len(held_out)} rows of {self.seq_len} tokens, fewer than the"
                f" {world_size} processes. Raise data.val_percent or data.val_rows, or use more text."
            )
        self.scored_rows = share * world_size
        mine = range(rank, self.scored_rows, world_size)
        return DataLoader(Subset(held_out, list(mine)), batch_size=self.val_batch_size, pin_memory=pin_memory)

    def folder(self) -> Path:
        """Where `prepare` puts the shards or chunks."""
        return self.pipeline().folder() if self._litdata is None else self._litdata.path

    def is_prepared(self) -> bool:
        """Whether all files are there; `prepare` also looks into them."""
        return is_complete(self.folder()) if self._litdata is None else self._litdata.is_complete()

    def pipeline(self) -> Pipeline:
        """From the documents to the shards, as the arguments say."""
        if self._pipeline is None:
            root = self.trainer.default_root_dir if self.trainer else self.default_root_dir
            self._pipeline = Pipeline(
                source=self.source,
                source_options=self.source_options,
                text_field=self.text_field,
                tokenizer=self.tokenizer,
                vocab_size=self.vocab_size,
                val_percent=self.val_percent,
                shard_mb=self.shard_mb,
                workers=self.prepare_workers,
                seq_len=self.seq_len,
                cache=Path(self.cache_dir) if self.cache_dir else Path(root, "data"),
            )
        return self._pipeline

    def prepare_data(self) -> None:
        self.prepare()

    def setup(self, stage: str) -> None:
        self.open()

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        trainer = self._trainer()
        if trainer.max_steps < 1:
            raise RecipeError(
                f"trainer.max_steps is {trainer.max_steps}; allowed: >= 1, the order of the data needs a length"
            )
        rank, world_size = _share(trainer)
        return self.train_loader(
            steps=trainer.max_steps,
            rank=rank,
            world_size=world_size,
            accumulate=trainer.accumulate_grad_batches,
            first_step=lambda: trainer.global_step,
            pin_memory=_pins(trainer),
        )

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        trainer = self._trainer()
        rank, world_size = _share(trainer)
        rows = self.val_rows if trainer.state.fn == "fit" else self.final_val_rows
        return self.val_loader(rank=rank, world_size=world_size, rows=rows, pin_memory=_pins(trainer))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must have in common with this one, and in "litdata" who began its passes over the data.

        Plain numbers and strings, the same on every process.
        """
        state: dict[str, Any] = {"mode": self.mode, **self._identity()}
        if self._litdata is not None:
            state["passes"] = [list(entry) for entry in self._passes]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises: RecipeError: the checkpoint was trained on other data or in another order; says what differs."""
        saved = {"mode": "shards", **state_dict}
        for name, value in {"mode": self.mode, **self._identity()}.items():
            if saved.get(name) == value:
                continue
            if name == "tokens_sha256":
                text = f"the checkpoint was trained on another text than {self._opened().folder} holds"
                hint = "Set data.source, data.tokenizer and data.cache_dir as they were (stdlib: run the same Python)"
            else:
                text = f"data.{name} is {value}, the checkpoint was trained with {saved.get(name)}"
                hint = "Set it back"
            raise RecipeError(f"{text}. {hint}, or start a new run in another folder.")
        if self._litdata is not None:
            self._passes[:] = saved["passes"]

    def _identity(self) -> dict[str, Any]:
        order = {"seq_len": self.seq_len, "batch_size": self.batch_size, "seed": self.seed}
        return {"tokens_sha256": self._opened().index.sha256, **order}

    @property
    def _litdata(self) -> LitdataFolder | None:
        return LitdataFolder(self.pipeline()) if self.mode == "litdata" else None

    def _chunk_loader(
        self,
        steps: int,
        rank: int,
        world_size: int,
        accumulate: int,
        first_step: Callable[[], int],
        pin_memory: bool,
    ) -> LitdataLoader:
        from am_lightning.pretrain.data.litdata_loader import Chunks, Grid, LitdataLoader

        grid = Grid(world_size, max(1, self.num_workers), share_of(self.batch_size, world_size, accumulate))
        chunks = self._opened().index.train
        in_pass = sum(chunk.tokens // self.seq_len for chunk in chunks) // self.batch_size
        if in_pass == 0:
            raise RecipeError(
                f"the training text is shorter than one step of data.batch_size {self.batch_size} rows of"
                f" {self.seq_len} tokens: use more text or smaller steps"
            )
        folder = LitdataFolder(self.pipeline())
        sums = {chunk.file: chunk.sha256 for chunk in chunks}
        return LitdataLoader(
            Chunks(folder.source, folder.pipeline.cache, sums, in_pass, self.seq_len, self.seed),
            self._passes,
            grid,
            rank=rank,
            steps=steps,
            accumulate=accumulate,
            first_step=first_step,
            num_workers=self.num_workers,
            pin_memory=pin_memory,
        )

    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError("no Trainer: pass this as trainer.fit(model, datamodule=data), or use train_loader()")
        return self.trainer

    def _opened(self) -> TokenShards:
        if self._shards is None:
            raise RuntimeError("TextData is not open: call prepare() on one process of the machine, then open()")
        return self._shards


def _pins(trainer: L.Trainer) -> bool:
    return trainer.strategy.root_device.type == "cuda"


def _share(trainer: L.Trainer) -> tuple[int, int]:
    """Rank and number among the processes that see different data: tensor-parallel ones see the same."""
    kwargs = trainer.distributed_sampler_kwargs or {}
    return kwargs.get("rank", trainer.global_rank), kwargs.get("num_replicas", trainer.world_size)
