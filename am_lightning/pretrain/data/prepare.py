"""Documents -> token shards, by several processes, going on where a killed one stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock

from am_lightning.pretrain.data.chunks import DataChunk, Document
from am_lightning.pretrain.data.processes import cores, run_all
from am_lightning.pretrain.data.shards import (
    DISK_CURE,
    FORMAT_VERSION,
    INDEX,
    SIDES,
    Index,
    Shard,
    check_shard,
    read_index,
    shard_damage,
    write_index,
)
from am_lightning.pretrain.data.sources import Source, group
from am_lightning.pretrain.data.tokenizer import Tokenizer, encode_all, token_dtype
from am_lightning.pretrain.runtime.atomic_files import replacing, write_failure
from am_lightning.pretrain.runtime.errors import RecipeError

MEGABYTE = 1 << 20
_SIDE_NAMES = {"train": "training", "val": "validation"}
_CHECK_ALONE = 256 * MEGABYTE  # reading so much takes less time than starting processes


@dataclass(frozen=True)
class WorkUnit:
    """Documents that one process tokenizes in one go.

    Attributes:
        number: in the order of the data set.
        chunks: of the data set.
        key: changes when the chunks do.
    """

    number: int
    chunks: tuple[DataChunk, ...]
    key: str

    def documents(self) -> Iterator[Document]:
        for chunk in self.chunks:
            yield from chunk.documents()


@dataclass(frozen=True)
class PartRecord:
    """What a part gave; kept beside the shards."""

    key: str
    documents: dict[str, int]
    train: tuple[Shard, ...]
    val: tuple[Shard, ...]


@dataclass(frozen=True)
class Job:
    """What all parts have in common.

    Attributes:
        folder: of the shards.
        tokenizer: of all documents.
        val_percent: share of the documents held out.
        shard_bytes: a file of tokens that has so many gets no further document.
    """

    folder: Path
    tokenizer: Tokenizer
    val_percent: float
    shard_bytes: int

    @property
    def dtype(self) -> str:
        return token_dtype(self.tokenizer.vocab_size)


def work_units(source: Source, shard_mb: int) -> list[WorkUnit]:
    """The parts of a data set: a function of the data and `shard_mb`, and of nothing else.

    Raises:
        RecipeError: a file of it cannot be read.
    """
    chunks = group(source.chunks(shard_mb * MEGABYTE), shard_mb * MEGABYTE)
    return [WorkUnit(i, part, hashlib.sha256(repr(part).encode()).hexdigest()) for i, part in enumerate(chunks)]


def write_shards(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    *,
    val_percent: float,
    shard_mb: int = 64,
    workers: int | None = None,
) -> None:
    """Make the shards of a data set in `folder`; nothing is done where they are there.

    Parts that an earlier call has finished are kept when their checksums are right. Every file is written whole or not
    at all, the index last. The result does not depend on the number of processes.

    Args:
        folder: made where it is missing.
        source: the documents.
        tokenizer: of all of them.
        val_percent: share of the documents held out.
        shard_mb: megabytes (2 ** 20 bytes) of text in a part, and of tokens in a file.
        workers: processes; None: one for every core, at most one for every part.

    Raises:
        RecipeError: the disk is full or the folder cannot be written, a document cannot be read, a process was killed,
            or one side of the split is empty.
    """
    if is_complete(folder):
        return
    with only_one(folder) as alone:
        if is_complete(folder):  # another process has made them meanwhile
            return
        if alone:
            for leftover in folder.rglob(".*.part"):  # of a killed process
                leftover.unlink(missing_ok=True)
        job = Job(folder, tokenizer, val_percent, shard_mb * MEGABYTE)
        parts = work_units(source, shard_mb)
        records = run_all(partial(write_part, job), parts, min(workers or cores(), len(parts)), "tokenizing")
        _finish(job, source, records)


def is_complete(folder: Path) -> bool:
    """Whether an index is there and every file that it names: damaged ones count, deleted ones are made anew."""
    if not (folder / INDEX).exists():
        return False
    return all((folder / shard.file).exists() for shard in read_index(folder).shards)


def check_shards(folder: Path, *, content: bool, workers: int | None = None) -> Index:
    """Compare all files with the index: their sizes, and where `content` their checksums, by several processes.

    Raises:
        RecipeError: names the first broken file and says what to do.
    """
    index = read_index(folder)
    count = min(workers or cores(), len(index.shards)) if content and index.bytes > _CHECK_ALONE else 1
    run_all(partial(_check, folder, index.dtype, content), index.shards, count, "checking")
    return index


def _check(folder: Path, dtype: str, content: bool, shard: Shard) -> None:
    check_shard(folder, shard, dtype, content=content)


def write_part(job: Job, part: WorkUnit) -> PartRecord:
    """Tokenize the documents of a part and write its shards; or only check them, where they are there.

    Raises:
        RecipeError: the disk refuses, or a document cannot be read.
    """
    path = job.folder / "parts" / f"{part.number:05d}.json"
    record = _read_record(path, job, part)
    if record is not None:
        return record
    writers = {side: _SideWriter(job, f"{side}-{part.number:05d}") for side in SIDES}
    sided = ((SIDES[document.is_validation(job.val_percent)], document.text) for document in part.documents())
    for side, tokens in encode_all(job.tokenizer, sided):
        writers[side].add(tokens)
    for writer in writers.values():
        writer.flush()
    counts = {side: writer.documents for side, writer in writers.items()}
    record = PartRecord(part.key, counts, *(tuple(writer.shards) for writer in writers.values()))
    with replacing(path, DISK_CURE) as file:
        file.write(json.dumps(dataclasses.asdict(record)).encode())
    return record


class _SideWriter:
    """Collects the documents of one side of a part, and writes a file whenever they are enough."""

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
        data = np.concatenate(self._arrays).tobytes()
        count = len(data) // np.dtype(self.job.dtype).itemsize
        shard = Shard(f"{self.name}-{len(self.shards):02d}.bin", count, hashlib.sha256(data).hexdigest())
        with replacing(self.job.folder / shard.file, DISK_CURE) as file:
            file.write(data)
        self.shards.append(shard)
        self._arrays, self._bytes = [], 0


def _read_record(path: Path, job: Job, part: WorkUnit) -> PartRecord | None:
    try:
        fields = json.loads(path.read_bytes())
        sides = {side: tuple(Shard(**shard) for shard in fields[side]) for side in SIDES}
        record = PartRecord(**{**fields, **sides})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    shards = record.train + record.val
    broken = any(shard_damage(job.folder / shard.file, shard, job.dtype, content=True) for shard in shards)
    return None if broken or record.key != part.key else record


def _finish(job: Job, source: Source, records: Sequence[PartRecord]) -> None:
    """Write the index, which makes the folder whole.

    Raises:
        RecipeError: there is no document on one side; then the folder goes.
    """
    documents = {side: sum(record.documents[side] for record in records) for side in SIDES}
    for side in SIDES:
        if not documents[side]:
            shutil.rmtree(job.folder, ignore_errors=True)
            raise RecipeError(
                f"{source.description}: no document falls into the {_SIDE_NAMES[side]} split"
                f" (data.val_percent is {job.val_percent}; a file's path or else the text"
                " decides). Use more documents, or change data.val_percent."
            )
    write_index(job.folder, _index(job, source, records, documents))


def _index(job: Job, source: Source, records: Sequence[PartRecord], documents: dict[str, int]) -> Index:
    return Index(
        FORMAT_VERSION,
        job.dtype,
        job.tokenizer.vocab_size,
        job.tokenizer.name,
        job.tokenizer.fingerprint,
        source.description,
        job.val_percent,
        documents,
        tuple(shard for record in records for shard in record.train),
        tuple(shard for record in records for shard in record.val),
    )


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[bool]:
    """Others who make the same shards wait, where the file system has locks; where not (False), they do the same."""
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(NotImplementedError):
            lock.acquire()
    except OSError as error:
        raise write_failure(folder, error, DISK_CURE) from error
    try:
        yield lock.is_locked
    finally:
        lock.release()
