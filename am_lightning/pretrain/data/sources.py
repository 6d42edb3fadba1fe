"""Sources of documents: the standard library of Python, files of text or of records, and the datasets library."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
class Source:
    """A data set.

    Attributes:
        description: name of the data set in messages.
        fingerprint: a hash that changes with the data set.
        chunks: function that yields the chunks in a fixed order. It cuts files of lines at about this many bytes.
    """

    description: str
    fingerprint: str
    chunks: Callable[[int], Iterator[DataChunk]]


def _file_chunks(root: Path, names: Sequence[str], text_field: str, chunk_bytes: int) -> Iterator[DataChunk]:
    """Yield the chunks of files. A record of parquet or JSON lines is a document, and so is any other file."""
    for name in names:
        path, size = str(root / name), _stat(root / name).st_size
        if name.endswith(".parquet"):
            yield from _row_groups(path, text_field)
        elif not name.endswith(_RECORDS):
            yield TextFile(str(root), name, size)
        elif name.endswith(".gz"):  # it can only be read from its beginning
            yield JsonLines(path, text_field, 0, 0, size)
        else:
            for start in range(0, size, chunk_bytes):
                stop = min(start + chunk_bytes, size)
                yield JsonLines(path, text_field, start, stop, stop - start)


def _row_groups(path: str, text_field: str) -> Iterator[DataChunk]:
    with parquet_file(path) as file:
        columns = file.schema_arrow.names
        if text_field not in columns:
            raise no_field(text_field, path, f"has {', '.join(columns)}")
        for group in range(file.num_row_groups):
            yield ParquetGroup(path, text_field, group, file.metadata.row_group(group).total_byte_size)


def _hub_chunks(name: str, options: str, text_field: str, chunk_bytes: int) -> Iterator[DataChunk]:
    """Yield the files of a data set that the `datasets` library streams."""
    count = load_hub(name, options).num_shards
    for index in range(count):
        yield HubShard(name, options, text_field, index, count, chunk_bytes)


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
        settings = (source.removeprefix(HUB), json.dumps(options or {}, sort_keys=True), text_field)
        # The data set itself is not looked at, so that a training node without a network finds the shards. Pin a
        # `revision` in the options if the data set may change.
        fingerprint = hashlib.sha256("\0".join(settings).encode()).hexdigest()
        return Source(source, fingerprint, partial(_hub_chunks, *settings))
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
    return Source(description, _fingerprint(root, names, text_field), partial(_file_chunks, root, names, text_field))


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
