"""Sources of documents: the standard library of Python, files of text or of records, and the datasets library."""

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
from typing import Any

from am_lightning.pretrain.data.chunks import (
    DataChunk,
    HubShard,
    JsonLines,
    ParquetGroup,
    TextFile,
    load_hub,
    no_field,
    parquet_file,
    reading,
)
from am_lightning.pretrain.runtime.errors import RecipeError, require

HUB = "hf:"
_RECORDS = (".parquet", ".jsonl", ".jsonl.gz", ".json.gz")
# The standard library is read without its tests, installed packages and compiled files. `config-*` and
# `_sysconfigdata*` describe the machine that built this Python, so they differ between machines.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
# Source files and documents that are always installed. The topics of pydoc are a .py file.
_STDLIB_SUFFIXES = {".py", ".txt", ".rst"}
_BINARY_PROBE = 8192  # a file with a NUL in this many first bytes is not text
_ALLOWED = '"stdlib", a folder, a file, a glob pattern, "hf:NAME", or a folder that prepare_data.py made'


@dataclass(frozen=True)
class FileSource:
    """Files below one folder. A record of parquet or JSON lines is a document, and so is any other file.

    Attributes:
        root: the folder.
        names: sorted paths of the files relative to `root`, with `/`.
        text_field: field or column of the text in records.
        description: name of the data set in messages.
        fingerprint: a hash that changes with the data set.
    """

    root: Path
    names: tuple[str, ...]
    text_field: str
    description: str
    fingerprint: str

    def chunks(self, chunk_bytes: int) -> Iterator[DataChunk]:
        """Yield the chunks in a fixed order. Uncompressed JSON lines are cut into chunks of about `chunk_bytes`."""
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
        if path.suffix == ".gz":  # it can only be read from its beginning
            yield JsonLines(str(path), self.text_field, 0, 0, size)
            return
        for start in range(0, size, chunk_bytes):
            stop = min(start + chunk_bytes, size)
            yield JsonLines(str(path), self.text_field, start, stop, stop - start)


@dataclass(frozen=True)
class HubSource:
    """A data set that the `datasets` library streams. Each of its files is a chunk.

    The fingerprint is a hash of the user's settings, so that a training node without a network finds the shards. Pin a
    `revision` in the options if the data set may change.
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


Source = FileSource | HubSource


def find_source(source: str, *, text_field: str = "text", options: dict[str, Any] | None = None) -> Source:
    """Return the data set with the name `source`.

    Args:
        source: "stdlib", a folder, a file, a glob pattern, or "hf:" and a name that datasets.load_dataset takes.
        text_field: field or column of the text in records.
        options: arguments of datasets.load_dataset, only for "hf:".

    Raises:
        RecipeError: if it does not exist or holds no text.
    """
    if source.startswith(HUB):
        require("streaming" not in (options or {}), "data.source_options", options, "no streaming, which is always on")
        return HubSource(source.removeprefix(HUB), json.dumps(options or {}, sort_keys=True), text_field)
    require(not options, "data.source_options", options, f"null, because data.source {source} is not {HUB}NAME")
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        names = _walk(root, stdlib=True)
        description = f"the standard library of Python {platform.python_version()}"
        hint = "This Python is installed without its source: set data.source to a folder of text files."
    else:
        root, names = _files(source)
        description = f"the text in {source}"
        hint = "Put text files there (binary and hidden ones are skipped), or change data.source."
    if not names:
        raise RecipeError(f"data.source {source}: found no text in {root}. {hint}")
    return FileSource(root, names, text_field, description, _fingerprint(root, names, text_field))


def _files(source: str) -> tuple[Path, tuple[str, ...]]:
    path = Path(source).expanduser()
    if path.is_dir():
        return path, _walk(path, stdlib=False)
    if not path.exists() and not glob.has_magic(source):
        raise RecipeError(f"data.source {source} does not exist. Allowed: {_ALLOWED}.")
    matches = [path] if path.exists() else map(Path, glob.glob(str(path), recursive=True))
    found = [match for match in matches if match.is_file() and _is_text(match)]
    root = Path(os.path.commonpath([match.parent for match in found])) if found else path.parent
    return root, tuple(sorted(match.relative_to(root).as_posix() for match in found))


def _walk(root: Path, *, stdlib: bool) -> tuple[str, ...]:
    def refuse(error: OSError) -> None:  # os.walk would skip the folder silently
        with reading(error.filename):
            raise error

    names = []
    for folder, subfolders, files in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not _is_skipped(name, stdlib)]
        for path in (Path(folder, name) for name in files if not _is_skipped(name, stdlib)):
            if path.is_file() and (path.suffix in _STDLIB_SUFFIXES if stdlib else _is_text(path)):
                names.append(path.relative_to(root).as_posix())
    return tuple(sorted(names))


def _is_skipped(name: str, stdlib: bool) -> bool:
    generated = stdlib and (name in _SKIPPED_FOLDERS or name.startswith(_SKIPPED_PREFIXES))
    return generated or name.startswith(".")


def _is_text(path: Path) -> bool:
    if path.name.endswith(_RECORDS):
        return True
    with reading(path), open(path, "rb") as file:
        probe = file.read(_BINARY_PROBE)
    return bool(probe) and b"\0" not in probe


def _stat(path: Path) -> os.stat_result:
    with reading(path):
        return path.stat()


def _fingerprint(root: Path, names: Sequence[str], text_field: str) -> str:
    digest = hashlib.sha256(text_field.encode() if any(name.endswith(_RECORDS) for name in names) else b"")
    for name in names:
        stat = _stat(root / name)
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
