"""Where documents come from: the Python's own standard library, files of text or of records, the datasets library."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from am_lightning.pretrain.data.chunks import (
    DataChunk,
    HubShard,
    JsonLines,
    ParquetGroup,
    TextFile,
    load_hub,
    no_field,
    parquet_file,
    unreadable,
)
from am_lightning.pretrain.runtime.errors import RecipeError, require

HUB = "hf:"
_RECORDS = (".parquet", ".jsonl", ".jsonl.gz", ".json.gz")
# Left out of the standard library: its tests, what others installed, what is not source. `config-*` and
# `_sysconfigdata*` describe the machine that built this Python, so they would differ from one machine to the next.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
# Source and the documents that are always installed (pydoc's topics are a .py file).
_STDLIB_SUFFIXES = {".py", ".txt", ".rst"}
_BINARY_PROBE = 8192  # bytes; a file with a NUL among them is not text
_ALLOWED = '"stdlib", a folder, a file, a glob pattern, "hf:NAME", or a folder that prepare_data.py made'


class Source(Protocol):
    """A data set.

    Attributes:
        description: what it is, for messages.
        fingerprint: changes when the data set does; says when shards are out of date.
    """

    @property
    def description(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def chunks(self, chunk_bytes: int) -> Iterator[DataChunk]:
        """In a fixed order; files that can be read from the middle are cut into chunks of about `chunk_bytes`."""
        ...


@dataclass(frozen=True)
class FileSource:
    """Files below one folder: parquet and JSON lines hold a document in every record, any other file is one.

    Attributes:
        root: the folder.
        names: the files' paths relative to `root`, with `/`, sorted.
        text_field: of the records.
    """

    root: Path
    names: tuple[str, ...]
    text_field: str
    description: str
    fingerprint: str

    def chunks(self, chunk_bytes: int) -> Iterator[DataChunk]:
        for name in self.names:
            path = self.root / name
            if name.endswith(".parquet"):
                yield from self._row_groups(str(path))
            elif name.endswith(_RECORDS):
                yield from self._line_ranges(path, chunk_bytes)
            else:
                yield TextFile(str(self.root), name, _stat(path).st_size)

    def _row_groups(self, path: str) -> Iterator[DataChunk]:
        with parquet_file(path) as file:
            columns = file.schema_arrow.names
            if self.text_field not in columns:
                raise no_field(self.text_field, path, f"has {', '.join(columns)}")
            for group in range(file.num_row_groups):
                yield ParquetGroup(path, self.text_field, group, file.metadata.row_group(group).total_byte_size)

    def _line_ranges(self, path: Path, chunk_bytes: int) -> Iterator[DataChunk]:
        size = _stat(path).st_size
        if path.suffix == ".gz":  # can only be read from its beginning
            yield JsonLines(str(path), self.text_field, 0, 0, size)
            return
        for start in range(0, size, chunk_bytes):
            stop = min(start + chunk_bytes, size)
            yield JsonLines(str(path), self.text_field, start, stop, stop - start)


@dataclass(frozen=True)
class HubSource:
    """A data set that the `datasets` library streams; each of its files is a chunk.

    The fingerprint is of what the user wrote: a training node without a network must find the shards, too. Pin a
    `revision` in the options where the data set may change.
    """

    name: str
    options: str
    text_field: str

    @property
    def description(self) -> str:
        return f"{HUB}{self.name}"

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.name}\0{self.options}\0{self.text_field}".encode()).hexdigest()

    def chunks(self, chunk_bytes: int) -> Iterator[DataChunk]:
        count = load_hub(self.name, self.options).num_shards
        for index in range(count):
            yield HubShard(self.name, self.options, self.text_field, index, count, chunk_bytes)


def find_source(source: str, *, text_field: str = "text", options: dict[str, Any] | None = None) -> Source:
    """The data set called `source`.

    Args:
        source: "stdlib", a folder, a file, a glob pattern, or "hf:" and a name that datasets.load_dataset takes.
        text_field: field or column of the text, in records.
        options: of datasets.load_dataset, for "hf:" alone.

    Raises:
        RecipeError: nothing is there, or it holds no text.
    """
    if source.startswith(HUB):
        require("streaming" not in (options or {}), "data.source_options", options, "no streaming: it is always on")
        return HubSource(source.removeprefix(HUB), json.dumps(options or {}, sort_keys=True), text_field)
    require(not options, "data.source_options", options, f"null, as data.source {source} does not begin with {HUB}")
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        names = _walk(root, _STDLIB_SUFFIXES)
        description = f"the standard library of Python {platform.python_version()}"
        hint = "This Python comes without its source: set data.source to a folder of text files."
    else:
        root, names = _files(source)
        description = f"the text in {source}"
        hint = "Put text files there (binary and hidden ones are passed over), or set data.source to something else."
    if not names:
        raise RecipeError(f"data.source {source}: found no text in {root}. {hint}")
    return FileSource(root, names, text_field, description, _fingerprint(root, names, text_field))


def group(chunks: Iterator[DataChunk], part_bytes: int) -> list[tuple[DataChunk, ...]]:
    """Pieces that follow each other, together about `part_bytes` of text: what one process does in one go."""
    parts: list[tuple[DataChunk, ...]] = []
    part: list[DataChunk] = []
    size = 0
    for chunk in chunks:
        if part and size + chunk.size > part_bytes:
            parts.append(tuple(part))
            part, size = [], 0
        part.append(chunk)
        size += chunk.size
    return [*parts, tuple(part)] if part else parts


def _files(source: str) -> tuple[Path, tuple[str, ...]]:
    path = Path(source).expanduser()
    if path.is_dir():
        return path, _walk(path, None)
    if path.exists():
        return path.parent, (path.name,) if _is_text(path) else ()
    if glob.has_magic(source):
        found = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file() and _is_text(p)]
        root = Path(os.path.commonpath([p.parent for p in found])) if found else Path(".")
        return root, tuple(sorted(p.relative_to(root).as_posix() for p in found))
    raise RecipeError(f"data.source {source} does not exist. Allowed: {_ALLOWED}.")


def _walk(root: Path, suffixes: set[str] | None) -> tuple[str, ...]:
    def refuse(error: OSError) -> None:  # os.walk would pass over the folder without a word
        raise unreadable(Path(error.filename), error) from error

    names = []
    for folder, subfolders, files in os.walk(root, onerror=refuse):
        subfolders[:] = [f for f in subfolders if not _is_skipped(f, suffixes is not None)]
        for file in files:
            path = Path(folder, file)
            if _is_skipped(file, suffixes is not None) or not path.is_file():
                continue
            if (path.suffix in suffixes) if suffixes is not None else _is_text(path):
                names.append(path.relative_to(root).as_posix())
    return tuple(sorted(names))


def _is_skipped(name: str, stdlib: bool) -> bool:
    if name.startswith("."):
        return True
    return stdlib and (name in _SKIPPED_FOLDERS or name.startswith(_SKIPPED_PREFIXES))


def _is_text(path: Path) -> bool:
    if path.name.endswith(_RECORDS):
        return True
    try:
        with open(path, "rb") as file:
            probe = file.read(_BINARY_PROBE)
    except OSError as error:
        raise unreadable(path, error) from error
    return bool(probe) and b"\0" not in probe


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise unreadable(path, error) from error


def _fingerprint(root: Path, names: Sequence[str], text_field: str) -> str:
    digest = hashlib.sha256(text_field.encode() if any(name.endswith(_RECORDS) for name in names) else b"")
    for name in names:
        stat = _stat(root / name)
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
