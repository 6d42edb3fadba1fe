"""A folder of token chunks that litdata reads, on a disk or in an object store, and what a run must know of it.

    index.json, chunk-0-N.bin   litdata's own; a chunk is 12 bytes and then tokens
    chunks.json                 the chunks' tokens and SHA-256, which litdata does not keep; written last
    held_out/                   the held-out tokens, a folder of shards without training tokens

The folder is made from a folder of shards. Every file of it can be copied or uploaded as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from am_lightning.pretrain.data.pipeline import CHECKED_BYTES, Pipeline
from am_lightning.pretrain.data.prepare import MEGABYTE, check_shards, is_complete, only_one
from am_lightning.pretrain.data.processes import cores, run_all
from am_lightning.pretrain.data.shards import (
    DISK_CURE,
    INDEX,
    Index,
    Shard,
    TokenShards,
    checksum,
    open_shards,
    read_index,
    shard_damage,
    write_index,
)
from am_lightning.pretrain.data.tokenizer import check_vocabulary
from am_lightning.pretrain.runtime.atomic_files import disk_error, replacing, write_failure
from am_lightning.pretrain.runtime.errors import RecipeError, first_line

CHUNKS = "chunks.json"
HELD_OUT = "held_out"
_HEADER = 12  # bytes before the tokens of a chunk of one item: how many items, where it begins, where it ends
_STORES = {"s3://": "boto3", "gs://": "google.cloud.storage"}  # and the package that reads it
_HINT = "prepare_data.py --data.mode litdata makes one"


@dataclass(frozen=True)
class LitdataFolder:
    """The chunks of `pipeline.source`: made from its documents, or a folder or URL of chunks that are there already."""

    pipeline: Pipeline

    @property
    def source(self) -> str:
        """What litdata reads: a path or a URL."""
        return self.pipeline.source if self.is_remote else str(self.path)

    @property
    def is_remote(self) -> bool:
        return "://" in self.pipeline.source

    @property
    def path(self) -> Path:
        """Where `chunks.json` and the held-out tokens are; of a URL, their copy."""
        if self.is_remote:
            key = hashlib.sha256(self.pipeline.source.encode()).hexdigest()
            return self.pipeline.cache / f"remote-{key[:16]}"
        made = Path(self.pipeline.source).expanduser()
        return made if self._is_given else self.pipeline.cache / f"{self.pipeline.folder().name}-litdata"

    @property
    def _is_given(self) -> bool:
        return (Path(self.pipeline.source).expanduser() / CHUNKS).exists()

    def prepare(self, *, check_all: bool = False) -> Index:
        """Make the chunks where they are not there, or fetch what a run needs of a URL, and check what is on this disk.

        Chunks of a URL are checked when they are read.

        Args:
            check_all: compare all checksums; otherwise those of more than 2 GiB are only looked at.

        Raises:
            RecipeError: the store or the disk refuses, a file is gone or damaged, or the model's vocabulary is too
                small.
        """
        if self.is_remote:
            fetch(self.pipeline.source, self.path)
        elif not self._is_given and not self.is_complete():
            self.pipeline.prepare()
            chunk_bytes = self.pipeline.shard_mb * MEGABYTE
            write_chunks(self.pipeline.folder(), self.path, seq_len=self.pipeline.seq_len, chunk_bytes=chunk_bytes)
        check_shards(self.path / HELD_OUT, content=True)
        index = self.read()
        check_vocabulary(self.pipeline.vocab_size, index.vocab_size, self.pipeline.tokenizer)
        if not self.is_remote:
            content = check_all or index.bytes <= CHECKED_BYTES
            workers = min(self.pipeline.workers or cores(), len(index.train)) if index.bytes > 256 * MEGABYTE else 1
            run_all(partial(_check, self.path, index.dtype, content), index.train, workers, "checking")
        return index

    def is_complete(self) -> bool:
        """Whether all files are there; of a URL, those that are kept on this disk."""
        if not (self.path / CHUNKS).exists() or not is_complete(self.path / HELD_OUT):
            return False
        return self.is_remote or all((self.path / chunk.file).exists() for chunk in self.read().train)

    def read(self) -> Index:
        """What the folder holds; the chunks are its `train` files.

        Raises:
            RecipeError: it is missing or broken.
        """
        return dataclasses.replace(read_index(self.path / HELD_OUT), train=_read_chunks(self.path / CHUNKS))

    def open(self) -> TokenShards:
        """The index, and the held-out tokens. Raises: RecipeError: as `read`."""
        return dataclasses.replace(open_shards(self.path / HELD_OUT), index=self.read())


def write_chunks(shards: Path, folder: Path, *, seq_len: int, chunk_bytes: int) -> None:
    """Make a folder of chunks from a folder of shards: whole, or not there at all.

    Args:
        shards: of the tokens.
        folder: of the chunks; what is there is replaced.
        seq_len: a chunk's tokens are a multiple of it, so that all rows of this length are in one chunk.
        chunk_bytes: of a chunk's tokens, about.

    Raises:
        RecipeError: the disk refuses.
    """
    require_litdata()
    tokens = open_shards(shards)
    size = max(1, chunk_bytes // tokens.train[0:1].itemsize // seq_len) * seq_len
    part = folder.with_name(f".{folder.name}.part")
    with only_one(part):
        if (folder / CHUNKS).exists() and all((folder / c.file).exists() for c in _read_chunks(folder / CHUNKS)):
            return  # another process has made it meanwhile
        for leftover in part.iterdir():  # of a killed process
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != ".lock":
                leftover.unlink()
        try:
            _write_with_litdata(part, tokens, size)
            held_out = dataclasses.replace(tokens.index, train=())
            for shard in held_out.val:
                (part / HELD_OUT).mkdir(exist_ok=True)
                shutil.copyfile(shards / shard.file, part / HELD_OUT / shard.file)
            write_index(part / HELD_OUT, held_out)
            _write_checksums(part)
            if folder.exists():
                shutil.rmtree(folder)
            part.rename(folder)
        except Exception as error:
            refused = disk_error(error)
            if refused is None or isinstance(error, RecipeError):
                raise
            raise write_failure(folder, refused, DISK_CURE) from error


def _write_with_litdata(folder: Path, tokens: TokenShards, size: int) -> None:
    from litdata import TokensLoader
    from litdata.streaming import Cache

    with litdata_ranks(0, 1):
        # What litdata.optimize's processes write with; here the chunks do not depend on how many processes there are.
        writer = Cache(str(folder), chunk_size=1, item_loader=TokensLoader(size))
        for number, start in enumerate(range(0, len(tokens.train), size)):
            writer[number] = tokens.train[start : start + size]
        writer.done()
        writer.merge()


def _write_checksums(folder: Path) -> None:
    written = json.loads((folder / INDEX).read_bytes())["chunks"]
    chunks = [Shard(chunk["filename"], chunk["dim"], checksum(folder / chunk["filename"])) for chunk in written]
    with replacing(folder / CHUNKS, DISK_CURE) as file:
        file.write(json.dumps([dataclasses.asdict(chunk) for chunk in chunks], indent=1).encode())


def _read_chunks(path: Path) -> tuple[Shard, ...]:
    try:
        return tuple(Shard(**fields) for fields in json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise RecipeError(f"{path.parent} is no folder of litdata chunks: it has no {CHUNKS}. {_HINT}.") from error
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"cannot read {path} ({error}). Copy it anew from where it is whole.") from error


def _check(folder: Path, dtype: str, content: bool, chunk: Shard) -> None:
    path = folder / chunk.file
    damage = shard_damage(path, chunk, dtype, content=content, header=_HEADER)
    if damage:
        raise RecipeError(
            f"the chunk {path} is broken: {damage}. Copy it anew from where it is whole, or delete it:"
            " prepare_data.py --data.mode litdata makes the folder anew from the documents."
        )


def fetch(url: str, folder: Path) -> None:
    """Copy into `folder` what a run needs of `url` from its beginning: the indices and the held-out tokens.

    Raises:
        RecipeError: the store refuses, there are no chunks, or the package that reads the store is not installed.
    """
    require_store(url)
    _download(url, folder, CHUNKS)
    _download(url, folder, f"{HELD_OUT}/{INDEX}")
    index = read_index(folder / HELD_OUT)
    for shard in index.val:
        if shard_damage(folder / HELD_OUT / shard.file, shard, index.dtype, content=True):
            _download(url, folder, f"{HELD_OUT}/{shard.file}")


def _download(url: str, folder: Path, name: str) -> None:
    from litdata.streaming.downloader import get_downloader

    content = io.BytesIO()
    try:
        get_downloader(url, str(folder), []).download_fileobj(f"{url.rstrip('/')}/{name}", content)
    except Exception as error:  # the network's, the store's
        raise RecipeError(
            f"data.source {url}: cannot read {name} ({first_line(error)}). {_HINT}, to be uploaded whole"
        ) from error
    with replacing(folder / name, DISK_CURE) as file:
        file.write(content.getbuffer())


def require_litdata() -> None:
    """Raises: RecipeError: litdata is not installed."""
    if importlib.util.find_spec("litdata") is None:
        raise RecipeError(
            "data.mode litdata needs litdata: pip install 'am-lightning[litdata]', or '.[litdata]' in a checkout"
        )


def require_store(url: str) -> None:
    """Raises: RecipeError: litdata reads no token chunks there, or lacks a package to do so."""
    package = next((package for scheme, package in _STORES.items() if url.startswith(scheme)), None)
    if package is None:
        raise RecipeError(
            f"data.source is {url!r}; with data.mode litdata allowed: documents as in shards, a local folder of chunks,"
            " s3://BUCKET/PATH or gs://BUCKET/PATH (of hf:// litdata reads parquet alone: hf download it to a folder)"
        )
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise RecipeError(f"data.source {url} needs {package.replace('.', '-')}: pip install it") from error


@contextlib.contextmanager
def litdata_ranks(rank: int, world_size: int) -> Iterator[None]:
    """What litdata takes for the processes of the run. It would take all, and tensor-parallel ones see the same rows.

    One node, whatever there are: the order of several depends on how many.
    """
    wanted = {"WORLD_SIZE": str(world_size), "GLOBAL_RANK": str(rank), "NNODES": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
