"""Pieces of a data set: what can be read on its own, each giving its documents in a fixed order."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from am_lightning.optional_imports import cause_of
from am_lightning.pretrain.data.hub import from_the_cache_alone, no_answer, offline_text
from am_lightning.pretrain.runtime.errors import RecipeError, first_line, needs_package

_ROWS = 1024  # read at a time
DATA_EXTRA = "pip install 'am-lightning[data]', or '.[data]' in a checkout"


@dataclass(frozen=True)
class Document:
    """A text and what decides its side of the split.

    Attributes:
        text: UTF-8 in general, never with a NUL; a file's bytes as they are.
        key: the relative path where the document is a file, else the text itself.
    """

    text: bytes
    key: bytes

    def is_validation(self, percent: float) -> bool:
        """Whether the document is held out: a pure function of its key, `percent` % of all keys."""
        bucket = int(hashlib.md5(self.key, usedforsecurity=False).hexdigest()[:8], 16)
        return bucket % 10_000 < percent * 100


class DataChunk(Protocol):
    """A picklable description; `size` is the text's in bytes, about, or 0 where nobody knows."""

    @property
    def size(self) -> int: ...

    def documents(self) -> Iterator[Document]:
        """Raises: RecipeError: it cannot be read, or is not what its name says."""
        ...


@dataclass(frozen=True)
class TextFile:
    """One file, which is one document."""

    root: str
    name: str
    size: int

    def documents(self) -> Iterator[Document]:
        path = Path(self.root, self.name)
        try:
            text = path.read_bytes().replace(b"\0", b"")
        except OSError as error:
            raise unreadable(path, error) from error
        yield Document(text, self.name.encode("utf-8", "surrogateescape"))


@dataclass(frozen=True)
class JsonLines:
    """The lines that begin in [start, stop) of a file of JSON objects; all of a compressed one (stop 0).

    Not by the datasets library, whose reader types every column: it refuses a file where a key appears, or another
    field's type changes, after its first 10 MB, takes dates for timestamps, and cannot start in the middle of a file.
    """

    path: str
    field: str
    start: int
    stop: int
    size: int

    def documents(self) -> Iterator[Document]:
        try:
            with open_json_lines(self.path) as file:
                yield from self._documents(file)
        except (OSError, EOFError) as error:
            raise unreadable(Path(self.path), error) from error

    def _documents(self, file: BinaryIO) -> Iterator[Document]:
        position = self.start
        if self.start:  # a line that began before belongs to the chunk before
            file.seek(self.start - 1)
            position = self.start - 1 + len(file.readline())
        while not self.stop or position < self.stop:
            line = file.readline()
            if not line:
                return
            if line.strip():
                yield from _record(self._parse(line, position), f"the line at byte {position} of {self.path}")
            position += len(line)

    def _parse(self, line: bytes, position: int) -> object:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RecipeError(
                f"{self.path}: the line at byte {position} is not JSON ({error}). Every line is to be one object."
            ) from error
        if not isinstance(record, dict) or self.field not in record:
            found = f"has {', '.join(record)}" if isinstance(record, dict) else f"is a {type(record).__name__}"
            raise no_field(self.field, f"the line at byte {position} of {self.path}", found)
        return record[self.field]


@dataclass(frozen=True)
class ParquetGroup:
    """One row group of a parquet file."""

    path: str
    field: str
    group: int
    size: int

    def documents(self) -> Iterator[Document]:
        where = f"row group {self.group} of {self.path}"
        with parquet_file(self.path) as file:
            try:
                for batch in file.iter_batches(_ROWS, row_groups=[self.group], columns=[self.field]):
                    for text in batch.column(0).to_pylist():
                        yield from _record(text, where)
            except OSError as error:  # pyarrow's errors of broken data are OSErrors
                raise unreadable(Path(self.path), error) from error


@dataclass(frozen=True)
class HubShard:
    """One of the files of a data set that the `datasets` library streams."""

    name: str
    options: str  # JSON, of load_dataset
    field: str
    index: int
    count: int
    size: int = 0

    def documents(self) -> Iterator[Document]:
        where = f"file {self.index} of hf:{self.name}"
        # iter(), unlike plain iteration, gives everything in a DataLoader's worker, too
        batches = load_hub(self.name, self.options).shard(self.count, self.index).iter(_ROWS)
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # whatever the network, the file system or the format has
                raise RecipeError(f"cannot read {where}: {first_line(error)}. Try again.") from error
            if batch is None:
                return
            if self.field not in batch:
                raise no_field(self.field, where, f"has {', '.join(batch)}")
            for text in batch[self.field]:
                yield from _record(text, where)


def _record(text: object, where: str) -> Iterator[Document]:
    """The document in a record; none where the text is missing or empty."""
    if text is None:
        return
    if not isinstance(text, str):
        raise RecipeError(f"{where}: the text is a {type(text).__name__}, not a string. Set data.text_field.")
    data = text.encode("utf-8", "replace").replace(b"\0", b"")  # "replace": JSON can hold half a surrogate pair
    if data:
        yield Document(data, data)


def open_json_lines(path: str) -> BinaryIO:
    """The file, decompressed where its name ends with .gz."""
    return cast(BinaryIO, gzip.open(path, "rb")) if path.endswith(".gz") else open(path, "rb")


def parquet_file(path: str) -> Any:
    """An open pyarrow.parquet.ParquetFile.

    Raises:
        RecipeError: pyarrow is not installed, or the file is not readable or not parquet.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        text = f"{path}: parquet needs pyarrow: {DATA_EXTRA}"
        raise needs_package(text, error, "pyarrow") from cause_of(error, "pyarrow")
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(Path(path), error) from error


@functools.lru_cache(maxsize=4)
def load_hub(name: str, options: str) -> Any:
    """A datasets.IterableDataset: `name` of the hub or of one of the library's own builders (json, parquet, text).

    Raises:
        RecipeError: the library is not installed or cannot load it.
    """
    try:
        import datasets
    except ImportError as error:
        text = f"data.source hf:{name} needs the datasets library: {DATA_EXTRA}"
        raise needs_package(text, error, "datasets") from cause_of(error, "datasets")
    offline = no_answer() if _is_on_the_hub(name, options) else None
    try:
        with contextlib.nullcontext() if offline is None else from_the_cache_alone(datasets.config):
            return datasets.load_dataset(name, **{"split": "train", **json.loads(options)}, streaming=True)
    except Exception as error:  # the library's own, the network's, the builder's
        if offline is not None:
            raise RecipeError(offline_text(f"data.source hf:{name}", offline, "local files")) from error
        raise RecipeError(
            f"data.source hf:{name}: the datasets library cannot load it ({first_line(error)})."
            " Check the name, data.source_options and the network, or give local files."
        ) from error


def _is_on_the_hub(name: str, options: str) -> bool:
    """Not a folder or a script here, and none of the library's own builders of local files."""
    builder = "/" not in name and "data_files" in json.loads(options)
    return not Path(name).exists() and (not builder or "hf://" in options)


def no_field(field: str, where: str, found: str) -> RecipeError:
    return RecipeError(f"data.text_field {field} is not in {where}, which {found}.")


def unreadable(path: Path, error: BaseException) -> RecipeError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return RecipeError(f"cannot read {path}: {reason}. Make it readable, or take it out of data.source.")
