"""A folder of token chunks that litdata reads, on a disk or in an object store.

    index.json, chunk-0-N.bin   litdata's own files; a chunk is a header of 12 bytes and then tokens
    val-00012-00.bin            held-out tokens, copied from a folder of shards
    chunks.json                 the `Index` of both, with the SHA-256 that litdata does not keep; written last

The folder is made from a folder of shards. Every file of it can be copied or uploaded as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from am_lightning.pretrain.data.pipeline import Pipeline
from am_lightning.pretrain.data.prepare import MEGABYTE, check_shards, is_complete, only_one
from am_lightning.pretrain.data.shards import (
    CACHE_OPTION,
    CHUNKS,
    DISK_HINT,
    INDEX,
    SIDES,
    Index,
    Shard,
    ShardedTokens,
    read_index,
    shard_damage,
    write_index,
)
from am_lightning.pretrain.runtime.atomic_files import checksum, disk_error, replacing, write_failure
from am_lightning.pretrain.runtime.errors import RecipeError, first_line, require

_HEADER = 12  # bytes before the tokens of a chunk of one item: number of items, begin, end


@dataclass(frozen=True)
class LitdataFolder:
    """The chunks of `pipeline.source`: made from its documents, or an existing folder or URL of chunks."""

    pipeline: Pipeline
    index_name: ClassVar[str] = CHUNKS

    @property
    def is_remote(self) -> bool:
        return "://" in self.pipeline.source

    def folder(self) -> Path:
        """Return the folder of `chunks.json` and the held-out tokens. A URL has a local copy of these.

        Raises:
            RecipeError: if it is a URL that litdata cannot read chunks from.
        """
        if self.is_remote:
            url = self.pipeline.source
            allowed = (
                "documents as in mode shards, a local folder of chunks, s3://BUCKET/PATH or gs://BUCKET/PATH"
                " (of hf:// litdata reads parquet alone: hf download it to a folder)"
            )
            require(url.startswith(("s3://", "gs://")), "data.source (data.mode litdata)", url, allowed)
            key = hashlib.sha256(url.encode()).hexdigest()
            return self.pipeline.cache / f"remote-{key[:16]}"
        given = Path(self.pipeline.source).expanduser()
        exists = (given / CHUNKS).exists()
        return given if exists else self.pipeline.cache / f"{self.pipeline.folder().name}-litdata"

    def prepare(self, *, check_all: bool = False) -> Index:
        """Make the chunks if they are missing, or fetch what a run needs of a URL, and check the local files.

        Chunks of a URL are checked when they are read. See `TextData.prepare`.
        """
        options, folder = self.pipeline, self.folder()
        if self.is_remote:
            self._fetch(folder)
        elif folder != Path(options.source).expanduser() and not self.is_complete():
            options.prepare()
            chunk_bytes = options.shard_mb * MEGABYTE
            write_chunks(options.folder(), folder, seq_len=options.seq_len, chunk_bytes=chunk_bytes)
        index = read_index(folder, CHUNKS)
        _check_names(folder, {chunk.file for chunk in index.train})
        check_shards(folder, index.val, index.dtype, read_all=True)
        if not self.is_remote:
            workers = options.prepare_workers
            check_shards(folder, index.train, index.dtype, read_all=check_all, workers=workers, header=_HEADER)
        return index

    def _fetch(self, folder: Path) -> None:
        """Copy into `folder` what a run needs of the URL before it starts: the indices and the held-out tokens."""
        url = self.pipeline.source
        _download(url, folder, INDEX)
        _download(url, folder, CHUNKS)
        index = read_index(folder, CHUNKS)
        for shard in index.val:
            if shard_damage(folder / shard.file, shard, index.dtype, content=True):
                _download(url, folder, shard.file)

    def is_complete(self) -> bool:
        """Return whether all files exist. For a URL, only the local files count."""
        return is_complete(self.folder(), self.index_name, ("val",) if self.is_remote else SIDES)


def write_chunks(shards: Path, folder: Path, *, seq_len: int, chunk_bytes: int) -> None:
    """Make a folder of chunks from a folder of shards. It appears only when it is complete.

    Args:
        shards: folder of the shards.
        folder: folder of the chunks. Its contents are replaced.
        seq_len: the number of a chunk's tokens is a multiple of it, so that every row of this length is in one chunk.
        chunk_bytes: approximate size of a chunk's tokens in bytes.

    Raises:
        RecipeError: if a file cannot be written.
    """
    from litdata import TokensLoader
    from litdata.streaming import Cache

    index = read_index(shards)
    tokens = ShardedTokens(shards, index.train, index.dtype)
    size = max(1, chunk_bytes // tokens[0:1].itemsize // seq_len) * seq_len
    part = folder.with_name(f".{folder.name}.part")
    with only_one(folder.parent):
        if is_complete(folder, CHUNKS):  # another process made it while this one waited
            return
        try:
            shutil.rmtree(part, ignore_errors=True)  # left by a killed process
            with litdata_ranks(0, 1):
                # The processes of litdata.optimize write with Cache, too, but their number decides what is in a chunk.
                writer = Cache(str(part), chunk_size=1, item_loader=TokensLoader(size))
                for number, start in enumerate(range(0, len(tokens), size)):
                    writer[number] = tokens[start : start + size]
                writer.done()
                writer.merge()
            written = json.loads((part / INDEX).read_bytes())["chunks"]
            chunks = [Shard(chunk["filename"], chunk["dim"], checksum(part / chunk["filename"])) for chunk in written]
            for shard in index.val:
                shutil.copyfile(shards / shard.file, part / shard.file)
            write_index(part / CHUNKS, dataclasses.replace(index, train=tuple(chunks)))
            if folder.exists():
                shutil.rmtree(folder)
            part.rename(folder)
        except Exception as error:
            refused = disk_error(error)
            if refused is None or isinstance(error, RecipeError):
                raise
            raise write_failure(folder, refused, DISK_HINT, CACHE_OPTION) from error


def _check_names(folder: Path, chunks: set[str]) -> None:
    """Require that litdata's own index, whose files litdata reads and downloads, names exactly `chunks`."""
    path, hint = folder / INDEX, "Copy it again from an undamaged folder."
    try:
        named = {chunk["filename"] for chunk in json.loads(path.read_bytes())["chunks"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RecipeError(f"cannot read {path} ({first_line(error)}). {hint}") from error
    if other := sorted(named ^ chunks):
        raise RecipeError(
            f"{path} and {CHUNKS} do not name the same chunks: only one of them names {other[0]!r}. {hint}"
        )


def _download(url: str, folder: Path, name: str) -> None:
    from litdata.streaming.downloader import get_downloader

    content = io.BytesIO()
    try:
        store = get_downloader(url, str(folder), [], storage_options(url))
        store.download_fileobj(f"{url.rstrip('/')}/{name}", content)
    except Exception as error:  # an error of the network or the store, or a missing package
        raise RecipeError(
            f"data.source {url}: cannot read {name} ({first_line(error)}). It is in the folder that"
            " prepare_data.py --data.mode litdata makes. Upload all of that folder."
        ) from error
    with replacing(folder / name, DISK_HINT, CACHE_OPTION) as file:
        file.write(content.getbuffer())


def storage_options(url: str) -> dict[str, Any]:
    """Return litdata's options of an object store. From S3 it would try 1000 times to read a file, which takes hours.

    boto3's own number of attempts is used, which AWS_MAX_ATTEMPTS changes. In a Lightning Studio, options would select
    other credentials.
    """
    in_studio = {"LIGHTNING_CLOUD_PROJECT_ID", "LIGHTNING_CLUSTER_ID"} <= os.environ.keys()
    if not url.startswith("s3://") or in_studio:
        return {}
    from botocore.config import Config

    return {"config": Config()}


@contextlib.contextmanager
def litdata_ranks(rank: int, world_size: int) -> Iterator[None]:
    """Tell litdata, which reads environment variables, which processes share the rows.

    It would take all processes of the run, but tensor-parallel ones see the same rows. The number of nodes is always 1,
    because litdata's order depends on it.
    """
    wanted = {"WORLD_SIZE": str(world_size), "GLOBAL_RANK": str(rank), "NNODES": "1"}
    before = {name: os.environ[name] for name in wanted if name in os.environ}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            del os.environ[name]
        os.environ.update(before)
