"""Chunks of a data set. Each can be read independently and yields its documents in a fixed order."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from am_lightning.pretrain.data.hub import hub_errors
from am_lightning.pretrain.runtime.errors import RecipeError, first_line, needs

_ROWS = 1024  # rows read at a time
DATA_EXTRA = "pip install 'am-lightning[data]', or '.[data]' in a checkout"


@dataclass(frozen=True)
class Document:
    """A text and the key that decides its side of the split.

    Attributes:
        text: the bytes of a file or the UTF-8 of a record, without NULs.
        key: the relative path of a file, or the text of a record.
    """

    text: bytes
    key: bytes

    def is_validation(self, percent: float) -> bool:
        """Return whether the document is held out, by a hash of its key. `percent` % of all keys are held out."""
        bucket = int(hashlib.md5(self.key, usedforsecurity=False).hexdigest()[:8], 16)
        return bucket % 10_000 < percent * 100


@dataclass(frozen=True)
class TextFile:
    """One file, which is one document."""

    root: str
    name: str
    size: int

    def documents(self) -> Iterator[Document]:
        path = Path(self.root, self.name)
        with reading(path):
            text = path.read_bytes().replace(b"\0", b"")
        yield Document(text, self.name.encode("utf-8", "surrogateescape"))


@dataclass(frozen=True)
class JsonLines:
    """The lines that begin in [start, stop) of a file of JSON objects, or all lines of a compressed file (stop 0).

    The reader of the datasets library is not used because it types every column: it refuses a file in which a key
    appears or a field's type changes after the first 10 MB, reads dates as timestamps, and cannot start in the middle.
    """

    path: str
    field: str
    start: int
    stop: int
    size: int

    def documents(self) -> Iterator[Document]:
        opener: Any = gzip.open if self.path.endswith(".gz") else open
        with reading(self.path), opener(self.path, "rb") as file:
            position = self.start
            if self.start:  # a line that begins before this chunk belongs to the previous one
                file.seek(self.start - 1)
                position = self.start - 1 + len(file.readline())
            while (not self.stop or position < self.stop) and (line := file.readline()):
                if line.strip():
                    yield from _record(self._parse(line, position), f"the line at byte {position} of {self.path}")
                position += len(line)

    def _parse(self, line: bytes, position: int) -> object:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RecipeError(
                f"{self.path}: the line at byte {position} is not JSON ({error}). Every line must be one object."
            ) from error
        if not isinstance(record, dict) or self.field not in record:
            found = f"has {', '.join(record)}" if isinstance(record, dict) else f"is a {type(record).__name__}"
            raise no_field(self.field, f"the line at byte {position} of {self.path}", found)
        return record[self.field]


@dataclass(frozen=True)
class ParquetGroup:
    """One row group of a parquet file.

    Processes share a file by its row groups, as they share a file of lines by its bytes. The Parquet builder of the
    datasets library would first copy the whole file as Arrow.
    """

    path: str
    field: str
    group: int
    size: int

    def documents(self) -> Iterator[Document]:
        where = f"row group {self.group} of {self.path}"
        with parquet_file(self.path) as file, reading(self.path):  # pyarrow raises OSErrors for broken data
            for batch in file.iter_batches(_ROWS, row_groups=[self.group], columns=[self.field]):
                for text in batch.column(0).to_pylist():
                    yield from _record(text, where)


@dataclass(frozen=True)
class HubShard:
    """One file of a data set that the `datasets` library streams."""

    name: str
    options: str  # arguments of load_dataset, as JSON
    field: str
    index: int
    count: int
    size: int

    def documents(self) -> Iterator[Document]:
        where = f"file {self.index} of hf:{self.name}"
        try:
            # Unlike plain iteration, iter() yields all rows in a DataLoader's worker, too.
            for batch in load_hub(self.name, self.options).shard(self.count, self.index).iter(_ROWS):
                if self.field not in batch:
                    raise no_field(self.field, where, f"has {', '.join(batch)}")
                for text in batch[self.field]:
                    yield from _record(text, where)
        except RecipeError:
            raise
        except Exception as error:  # an error of the network, the file system or the format
            raise RecipeError(f"cannot read {where}: {first_line(error)}. Try again.") from error


DataChunk = TextFile | JsonLines | ParquetGroup | HubShard


def _record(text: object, where: str) -> Iterator[Document]:
    """Yield the document of a record, or nothing if the text is missing or empty."""
    if text is None:
        return
    if not isinstance(text, str):
        raise RecipeError(f"{where}: the text is a {type(text).__name__}, not a string. Set data.text_field.")
    data = text.encode("utf-8", "replace").replace(b"\0", b"")  # "replace": JSON can hold half a surrogate pair
    if data:
        yield Document(data, data)


def parquet_file(path: str) -> Any:
    """Open a pyarrow.parquet.ParquetFile. Raises: RecipeError: if pyarrow is missing or the file is not readable."""
    with needs("pyarrow", f"{path}: parquet needs pyarrow: {DATA_EXTRA}"):
        import pyarrow
        import pyarrow.parquet
    with reading(path, pyarrow.ArrowException):
        return pyarrow.parquet.ParquetFile(path)


@functools.lru_cache(maxsize=4)
def load_hub(name: str, options: str) -> Any:
    """Return the datasets.IterableDataset of a name on the hub or of a builder of the library (json, parquet, text).

    Raises:
        RecipeError: if the library is not installed or cannot load it.
    """
    with needs("datasets", f"data.source hf:{name} needs the datasets library: {DATA_EXTRA}"):
        import datasets
    arguments: dict[str, Any] = {"split": "train", **json.loads(options)}
    local_builder = "/" not in name and "data_files" in arguments and "hf://" not in options
    with hub_errors(
        f"data.source hf:{name}",
        "the datasets library",
        datasets.config,
        remote=not Path(name).exists() and not local_builder,
        hint="Check the name, data.source_options and the network, or give local files.",
        instead="local files",
    ):
        return datasets.load_dataset(name, **arguments, streaming=True)


def no_field(field: str, where: str, found: str) -> RecipeError:
    return RecipeError(f"data.text_field {field} is not in {where}, which {found}.")


@contextlib.contextmanager
def reading(path: str | Path, *errors: type[Exception]) -> Iterator[None]:
    """Raise a RecipeError that names `path` in place of an OSError, an EOFError or one of `errors`."""
    caught: tuple[type[Exception], ...] = (OSError, EOFError, *errors)
    try:
        yield
    except caught as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RecipeError(f"cannot read {path}: {reason}. Make it readable, or take it out of data.source.") from error
