"""TextData: bytes of a text corpus for causal language modelling, resumable at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Subset

from am_lightning.recipes.data.corpus import Corpus, find_corpus
from am_lightning.recipes.data.order import ResumableLoader, StepOrder, TokenRows
from am_lightning.recipes.data.tokens import VOCAB_SIZE, TokenFile, open_token_file, token_file_name, write_token_file
from am_lightning.recipes.errors import RecipeError, require


class TextData(L.LightningDataModule):
    """Documents -> bytes -> one token file -> rows of `seq_len` tokens, int64 (batch, seq_len).

    The token file is made once, in `cache_dir`. Files whose path falls into a fixed `val_percent` % are held out for
    validation. Which rows make up step s depends on `seed` and s alone (see `order.StepOrder`).

    Args:
        source: "stdlib" (the running Python's own source and documents) or the path of a folder of text files.
        seq_len: tokens in a row.
        vocab_size: the model's; 256 at least, a token is a byte.
        batch_size: rows per optimizer step, over all processes and micro-batches.
        val_percent: share of the files held out, in percent.
        val_rows: rows of a validation during training, evenly spaced over the held-out text.
        final_val_rows: rows of the validation after training (and of `validate`).
        val_batch_size: rows of a validation batch on one process.
        cache_dir: folder of the token file; None: `data` below the Trainer's default_root_dir.
        seed: of the order.
        num_workers: loader processes; a row is a slice of a memory map, so 0 is enough.

    Raises:
        RecipeError: an argument is out of range. The hooks raise it for corpora, token files and checkpoints that do
            not fit (see corpus.py, tokens.py, order.py).
    """

    def __init__(
        self,
        source: str = "stdlib",
        seq_len: int = 128,
        vocab_size: int = 256,
        batch_size: int = 8,
        val_percent: float = 5.0,
        val_rows: int = 256,
        final_val_rows: int = 1024,
        val_batch_size: int = 64,
        cache_dir: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        counts = {"seq_len": seq_len, "batch_size": batch_size, "val_rows": val_rows, "final_val_rows": final_val_rows}
        for name, value in {**counts, "val_batch_size": val_batch_size}.items():
            lowest = 2 if name == "seq_len" else 1
            require(value >= lowest, f"data.{name}", value, f"a whole number >= {lowest}")
        require(vocab_size >= VOCAB_SIZE, "model.vocab_size", vocab_size, f">= {VOCAB_SIZE}: a token is a byte")
        require(0 < val_percent < 100, "data.val_percent", val_percent, "0 < value < 100")
        require(num_workers >= 0, "data.num_workers", num_workers, ">= 0")
        require(seed >= 0, "data.seed", seed, ">= 0")
        self.source, self.seq_len, self.batch_size, self.val_percent = source, seq_len, batch_size, val_percent
        self.val_rows, self.final_val_rows, self.val_batch_size = val_rows, final_val_rows, val_batch_size
        self.cache_dir, self.seed, self.num_workers = cache_dir, seed, num_workers
        self.scored_rows = 0  # of the last val_dataloader(), over all processes
        self._corpus: Corpus | None = None
        self._tokens: TokenFile | None = None

    def prepare_data(self) -> None:
        """On one process of every machine: make the token file if it is not there, check all of it if it is."""
        path = self._token_path()
        if not path.exists():
            write_token_file(path, self._find_corpus(), self.val_percent)
        open_token_file(path, verify=True)

    def setup(self, stage: str) -> None:
        """On every process: open the token file."""
        self._tokens = open_token_file(self._token_path(), verify=False)

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        trainer = self._trainer()
        if trainer.max_steps < 1:
            raise RecipeError(
                f"trainer.max_steps is {trainer.max_steps}; allowed: >= 1, the order of the data needs a length"
            )
        rows = TokenRows(self._open().train, self.seq_len)
        order = StepOrder(
            len(rows),
            self.batch_size,
            trainer.max_steps,
            seed=self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
            first_step=lambda: trainer.global_step,
        )
        return ResumableLoader(
            rows, batch_sampler=order, num_workers=self.num_workers, persistent_workers=self.num_workers > 0
        )

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        """This process's share of the validation rows: every rank has equally many, as collectives need."""
        trainer = self._trainer()
        wanted = self.val_rows if trainer.state.fn == "fit" else self.final_val_rows
        rows = TokenRows(self._open().val, self.seq_len, wanted)
        share = len(rows) // trainer.world_size
        if share == 0:
            raise RecipeError(
                f"the validation text has {len(rows)} rows of {self.seq_len} tokens, fewer than the"
                f" {trainer.world_size} processes. Raise data.val_percent or data.val_rows, or use more text."
            )
        self.scored_rows = share * trainer.world_size
        mine = range(trainer.global_rank, self.scored_rows, trainer.world_size)
        return DataLoader(Subset(rows, list(mine)), batch_size=self.val_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """What must be the same for a resumed run to see the samples the unbroken one would have seen."""
        return {
            "tokens_sha256": self._open().header.sha256,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in self.state_dict().items():
            if state_dict.get(name) == value:
                continue
            if name == "tokens_sha256":
                text = f"the checkpoint was trained on another text than {self._open().path} holds"
                cure = "Set data.source and data.cache_dir as they were (stdlib: run the same Python)"
            else:
                text = f"data.{name} is {value}, the checkpoint was trained with {state_dict.get(name)}"
                cure = "Set it back"
            raise RecipeError(f"{text}. {cure}, or start a new run in another folder.")

    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError("TextData needs a Trainer: pass it as trainer.fit(model, datamodule=data)")
        return self.trainer

    def _find_corpus(self) -> Corpus:
        if self._corpus is None:
            self._corpus = find_corpus(self.source)
        return self._corpus

    def _token_path(self) -> Path:
        folder = Path(self.cache_dir) if self.cache_dir else Path(self._trainer().default_root_dir, "data")
        return folder / token_file_name(self._find_corpus(), self.val_percent)

    def _open(self) -> TokenFile:
        if self._tokens is None:
            raise RuntimeError("TextData.setup() has not run")
        return self._tokens
