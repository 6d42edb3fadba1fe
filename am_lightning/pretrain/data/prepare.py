"""Write documents as token shards with several processes. A second call resumes where a killed one stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from filelock import FileLock

from am_lightning.pretrain.data.chunks import DataChunk
from am_lightning.pretrain.data.processes import run_all
from am_lightning.pretrain.data.shards import (
    CACHE_OPTION,
    DISK_HINT,
    FORMAT_VERSION,
    INDEX,
    SIDES,
    Index,
    Shard,
    read_index,
    rebuild_hint,
    shard_damage,
    write_index,
)
from am_lightning.pretrain.data.sources import Source
from am_lightning.pretrain.data.tokenizer import Tokenizer, encode_document
from am_lightning.pretrain.runtime.atomic_files import replacing, write_failure
from am_lightning.pretrain.runtime.errors import RecipeError

WorkUnit = tuple[DataChunk, ...]  # chunks of the data set that one process tokenizes in one go

MEGABYTE = 1 << 20
_SIDE_NAMES = {"train": "training", "val": "validation"}
_CHECKED_BYTES = 2 << 30  # tokens of at most this size are read at every start; more by prepare_data.py --check
_CHECK_ALONE = 256 * MEGABYTE  # one process reads this many bytes sooner than several processes start


@dataclass(frozen=True)
class Job:
    """Documents to write as token shards.

    Attributes:
        folder: folder of the shards. It is created if it is missing.
        source: the documents.
        tokenizer: tokenizer of all documents.
        val_percent: share of the documents that is held out, in percent.
        shard_bytes: bytes of text in a work unit. A file with this many bytes of tokens gets no further document.
    """

    folder: Path
    source: Source
    tokenizer: Tokenizer
    val_percent: float
    shard_bytes: int = 64 * MEGABYTE


def work_units(source: Source, unit_bytes: int) -> list[WorkUnit]:
    """Cut a data set into units of about `unit_bytes` of text. Raises: RecipeError: if a file cannot be read."""
    units: list[list[DataChunk]] = []
    size = 0
    for chunk in source.chunks(unit_bytes):
        if not units or size + chunk.size > unit_bytes:
            units.append([])
            size = 0
        units[-1].append(chunk)
        size += chunk.size
    return [tuple(chunks) for chunks in units]


def write_shards(job: Job, workers: int | None = None) -> None:
    """Write the shards of `job`, unless they are complete.

    Parts that an earlier call has finished are kept if their checksums are right. Every file is written whole or not
    at all, the index last. The result does not depend on the number of processes.

    Args:
        job: the documents and the folder.
        workers: number of processes, at most one per work unit. Default: one per core.

    Raises:
        RecipeError: if the disk is full, the folder cannot be written, a document cannot be read, a process was
            killed, or one side of the split is empty.
    """
    with only_one(job.folder) as alone:
        if is_complete(job.folder):  # perhaps another process wrote them while this one waited
            return
        if alone:
            for leftover in job.folder.rglob(".*.part"):  # written by a killed process
                leftover.unlink(missing_ok=True)
        units = list(enumerate(work_units(job.source, job.shard_bytes)))
        _finish(job, run_all(partial(write_part, job), units, workers, "tokenizing"))


def is_complete(folder: Path, name: str = INDEX, sides: Sequence[str] = SIDES) -> bool:
    """Return whether the index and all files of `sides` exist, even damaged. Raises: RecipeError: as `read_index`."""
    if not (folder / name).exists():
        return False
    index = read_index(folder, name)
    return all((folder / shard.file).exists() for side in sides for shard in getattr(index, side))


def check_shards(
    folder: Path, shards: Sequence[Shard], dtype: str, *, read_all: bool, workers: int | None = None, header: int = 0
) -> None:
    """Compare the sizes of files with their index, and their checksums if together they have at most 2 GiB.

    Args:
        folder: folder of the files.
        shards: entries of the index.
        dtype: type of a token.
        read_all: compare the checksums of larger files, too.
        workers: number of processes that compute checksums. Default: one per core.
        header: bytes before the tokens of each file.

    Raises:
        RecipeError: if a file is missing, unreadable or damaged.
    """
    size = sum(shard.tokens for shard in shards) * np.dtype(dtype).itemsize
    content = read_all or size <= _CHECKED_BYTES
    alone = not content or size <= _CHECK_ALONE
    run_all(partial(_check, folder, dtype, content, header), shards, 1 if alone else workers, "checking")


def _check(folder: Path, dtype: str, content: bool, header: int, shard: Shard) -> None:
    path = folder / shard.file
    if damage := shard_damage(path, shard, dtype, content=content, header=header):
        raise RecipeError(f"the token shard {path} is broken: {damage}. {rebuild_hint(path)}")


def write_part(job: Job, numbered: tuple[int, WorkUnit]) -> Index:
    """Tokenize the documents of a work unit and write its shards, unless they exist and have the right checksums.

    Args:
        job: the documents and the folder.
        numbered: the unit after its position in the order of the data set.

    Returns:
        The index of the files.

    Raises:
        RecipeError: if a file cannot be written or a document cannot be read.
    """
    number, unit = numbered
    key = hashlib.sha256(repr(unit).encode()).hexdigest()
    path, tokenizer = job.folder / "parts" / f"{number:05d}-{key[:16]}.json", job.tokenizer
    with contextlib.suppress(RecipeError):
        index = read_index(path.parent, path.name)
        damages = (shard_damage(job.folder / one.file, one, tokenizer.dtype, content=True) for one in index.shards)
        if not any(damages):
            return index
    writers = {side: _SideWriter(job, f"{side}-{number:05d}") for side in SIDES}
    for document in chain.from_iterable(chunk.documents() for chunk in unit):
        side = SIDES[document.is_validation(job.val_percent)]
        writers[side].add(encode_document(tokenizer, document.text))
    for writer in writers.values():
        writer.flush()
    index = Index(
        FORMAT_VERSION,
        tokenizer.dtype,
        tokenizer.vocab_size,
        tokenizer.name,
        tokenizer.fingerprint,
        job.source.description,
        job.val_percent,
        {side: writer.documents for side, writer in writers.items()},
        *(tuple(writer.shards) for writer in writers.values()),
    )
    write_index(path, index)
    return index


class _SideWriter:
    """Collects the documents of one side of a work unit and writes a file whenever they suffice for one."""

    def __init__(self, job: Job, name: str) -> None:
        self.job, self.name = job, name
        self.shards: list[Shard] = []
        self.documents = 0
        self._arrays: list[np.ndarray] = []
        self._bytes = 0

    def add(self, tokens: np.ndarray) -> None:
        if self._bytes >= self.job.shard_bytes:
            self.flush()
        self.documents += 1
        self._arrays.append(tokens)
        self._bytes += tokens.nbytes

    def flush(self) -> None:
        if not self._arrays:
            return
        tokens = np.concatenate(self._arrays)
        data = tokens.tobytes()
        shard = Shard(f"{self.name}-{len(self.shards):02d}.bin", len(tokens), hashlib.sha256(data).hexdigest())
        with replacing(self.job.folder / shard.file, DISK_HINT, CACHE_OPTION) as file:
            file.write(data)
        self.shards.append(shard)
        self._arrays, self._bytes = [], 0


def _finish(job: Job, parts: Sequence[Index]) -> None:
    """Write the index, which completes the folder. If one side has no document, delete the folder and raise."""
    documents = {side: sum(part.documents[side] for part in parts) for side in SIDES}
    for side in SIDES:
        if not documents[side]:
            shutil.rmtree(job.folder, ignore_errors=True)
            raise RecipeError(
                f"{job.source.description}: no document falls into the {_SIDE_NAMES[side]} split"
                f" (data.val_percent is {job.val_percent}; a hash of a file's path or of"
                " a record's text decides). Use more documents, or change data.val_percent."
            )
    train, val = (tuple(shard for part in parts for shard in getattr(part, side)) for side in SIDES)
    write_index(job.folder / INDEX, dataclasses.replace(parts[0], documents=documents, train=train, val=val))


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[bool]:
    """Lock `folder` against other processes that write it, and yield whether the file system has locks.

    Without locks, these processes write the same files at the same time.
    """
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(NotImplementedError):
            lock.acquire()
    except OSError as error:
        raise write_failure(folder, error, DISK_HINT, CACHE_OPTION) from error
    try:
        yield lock.is_locked
    finally:
        lock.release()
