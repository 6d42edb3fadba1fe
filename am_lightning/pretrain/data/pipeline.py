"""Turn a source of documents and a tokenizer into a folder of token shards."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from am_lightning.pretrain.data.prepare import MEGABYTE, Job, check_shards, is_complete, work_units, write_shards
from am_lightning.pretrain.data.shards import CHUNKS, FORMAT_VERSION, INDEX, Index, read_index
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
from am_lightning.pretrain.runtime.errors import RecipeError

_BPE_TEXT = 32 * MEGABYTE  # text that a tokenizer is trained on


@dataclass(frozen=True)
class Pipeline:
    """Documents and their folder of token shards. The fields are arguments of `TextData`.

    Attributes:
        cache: folder of everything that is made.
    """

    source: str
    source_options: dict[str, Any] | None
    text_field: str
    tokenizer: str
    vocab_size: int
    val_percent: float
    shard_mb: int
    prepare_workers: int | None
    seq_len: int
    cache: Path
    index_name: ClassVar[str] = INDEX

    def prepare(self, *, check_all: bool = False) -> Index:
        """Make the shards if they are missing, and check them. See `TextData.prepare`."""
        folder, given = self.folder(), Path(self.source).expanduser()
        if (given / CHUNKS).exists():
            raise RecipeError(f"data.source {self.source} is a folder of litdata chunks: set data.mode litdata")
        if not is_complete(folder) and folder != given:
            tokenizer = self.load_tokenizer()
            check_vocabulary(self.vocab_size, tokenizer.vocab_size, self.tokenizer)
            job = Job(folder, self.documents, tokenizer, self.val_percent, self.shard_mb * MEGABYTE)
            write_shards(job, self.prepare_workers)
        index = read_index(folder)
        check_shards(folder, index.shards, index.dtype, read_all=check_all, workers=self.prepare_workers)
        return index

    def is_complete(self) -> bool:
        """Return whether all files exist."""
        return is_complete(self.folder())

    def folder(self) -> Path:
        """Return the folder of the shards. Its name changes with the documents, the tokenizer and the split."""
        given = Path(self.source).expanduser()
        if (given / INDEX).exists():
            return given
        slug = re.sub(r"[^A-Za-z0-9.-]+", "-", self.tokenizer.rstrip("/").split("/")[-1])
        parts = (FORMAT_VERSION, self.documents.fingerprint, local_fingerprint(self.tokenizer))
        return self.cache / f"{slug}-{self._key(hashlib.sha256(repr(parts).encode()).hexdigest())}"

    @functools.cached_property
    def documents(self) -> Source:
        """The data set. Raises: RecipeError: if it does not exist or holds no text."""
        return find_source(self.source, text_field=self.text_field, options=self.source_options)

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer; first train a "bpe-N" that does not exist yet."""
        size = bpe_size(self.tokenizer)
        if size is None:
            return load_named(self.tokenizer)
        path = self.cache / "tokenizers" / f"{self.tokenizer}-{self._key(self.documents.fingerprint)}.json"
        if not path.exists():
            train_bpe(size, self._sample(_BPE_TEXT), path)
        return load_bpe(self.tokenizer, path)

    def _key(self, fingerprint: str) -> str:
        return hashlib.sha256(f"{fingerprint} {self.val_percent} {self.shard_mb}".encode()).hexdigest()[:16]

    def _sample(self, wanted: int) -> Iterator[bytes]:
        """Yield training documents of about `wanted` bytes in all, from all parts of the data."""
        units = work_units(self.documents, self.shard_mb * MEGABYTE)
        for unit in units:
            left = wanted / len(units)
            for document in chain.from_iterable(chunk.documents() for chunk in unit):
                if left <= 0:
                    break
                if not document.is_validation(self.val_percent):
                    yield document.text
                    left -= len(document.text)
