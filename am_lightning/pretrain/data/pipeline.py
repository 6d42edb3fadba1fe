"""One path from what the user named (a source, a tokenizer) to a folder of token shards."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from am_lightning.pretrain.data.prepare import (
    MEGABYTE,
    WorkUnit,
    check_shards,
    is_complete,
    work_units,
    write_shards,
)
from am_lightning.pretrain.data.shards import FORMAT_VERSION, INDEX, Index, read_index
from am_lightning.pretrain.data.sources import Source, find_source
from am_lightning.pretrain.data.tokenizer import (
    Tokenizer,
    bpe_size,
    check_vocabulary,
    load_bpe,
    load_named,
    local_fingerprint,
    train_bpe,
)

CHECKED_BYTES = 2 << 30  # of tokens: so much is read whole at every start; more by prepare_data.py --check
_BPE_TEXT = 32 * MEGABYTE  # that a tokenizer is trained on


@dataclass(frozen=True)
class Pipeline:
    """What TextData's arguments of the same names say, see there; `cache` is the folder of all that is made."""

    source: str
    source_options: dict[str, Any] | None
    text_field: str
    tokenizer: str
    vocab_size: int
    val_percent: float
    shard_mb: int
    workers: int | None
    seq_len: int
    cache: Path

    def prepare(self, *, check_all: bool = False) -> Index:
        """Make the shards where they are not there, and check them.

        Args:
            check_all: compare all checksums, however much there is to read.

        Raises:
            RecipeError: see `prepare.write_shards`, `prepare.check_shards` and `tokenizer.check_vocabulary`.
        """
        folder = self.folder()
        if not is_complete(folder) and folder != Path(self.source).expanduser():
            tokenizer = self.load_tokenizer(train=True)
            check_vocabulary(self.vocab_size, tokenizer.vocab_size, self.tokenizer)
            write_shards(
                folder,
                self.documents,
                tokenizer,
                val_percent=self.val_percent,
                shard_mb=self.shard_mb,
                workers=self.workers,
            )
        index = read_index(folder)
        check_vocabulary(self.vocab_size, index.vocab_size, self.tokenizer)
        return check_shards(folder, content=check_all or index.bytes <= CHECKED_BYTES, workers=self.workers)

    def folder(self) -> Path:
        """Where the shards are or will be: its name changes with the documents, the tokenizer and the split."""
        made = Path(self.source).expanduser()
        if (made / INDEX).exists():
            return made
        slug = re.sub(r"[^A-Za-z0-9.-]+", "-", self.tokenizer.rstrip("/").split("/")[-1])
        key = hashlib.sha256(f"{self.fingerprint()} {self.val_percent} {self.shard_mb}".encode()).hexdigest()
        return self.cache / f"{slug}-{key[:16]}"

    def fingerprint(self) -> str:
        """Changes with the documents and the tokenizer."""
        parts = (FORMAT_VERSION, self.documents.fingerprint, local_fingerprint(self.tokenizer))
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @functools.cached_property
    def documents(self) -> Source:
        """The data set. Raises: RecipeError: it does not exist or holds no text."""
        return find_source(self.source, text_field=self.text_field, options=self.source_options)

    @functools.cached_property
    def parts(self) -> list[WorkUnit]:
        """The documents as `prepare.work_units` cuts them."""
        return work_units(self.documents, self.shard_mb)

    def load_tokenizer(self, *, train: bool = False) -> Tokenizer:
        """The tokenizer.

        Args:
            train: a "bpe-N" that is not there yet is trained.

        Raises:
            RecipeError: it cannot be loaded.
        """
        size = bpe_size(self.tokenizer)
        if size is None:
            return load_named(self.tokenizer)
        key = hashlib.sha256(f"{self.documents.fingerprint} {self.val_percent} {self.shard_mb}".encode())
        path = self.cache / "tokenizers" / f"{self.tokenizer}-{key.hexdigest()[:16]}.json"
        if train and not path.exists():
            train_bpe(size, self._sample(_BPE_TEXT), path)
        return load_bpe(self.tokenizer, path)

    def _sample(self, wanted: int) -> Iterator[bytes]:
        """Training documents of about `wanted` bytes in all, from all over the data."""
        for part in self.parts:
            left = wanted / len(self.parts)
            for document in part.documents():
                if left <= 0:
                    break
                if not document.is_validation(self.val_percent):
                    yield document.text
                    left -= len(document.text)
