"""Token shards: files of tokens and nothing else, in one folder, with an index that says what they are.

    index.json               written last: where it is, the folder is whole
    train-00012-00.bin       the training tokens of part 12 of the documents; -01 where they are too many for one file
    val-00012-00.bin         the held-out ones
    parts/00012.json         what part 12 gave: a part that is done is not done again

The training tokens are those of all `train` files one after the other, in the order of the index; after every document
stands an end-of-text token. A row is `seq_len` tokens in a row; neither documents nor shards are aligned to rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from am_lightning.pretrain.runtime.atomic_files import replacing
from am_lightning.pretrain.runtime.errors import RecipeError

FORMAT_VERSION = 2
INDEX = "index.json"
SIDES = ("train", "val")
DISK_CURE = "Free some space, or set data.cache_dir to a folder on another disk. The same command goes on from here."
_DTYPES = ("uint8", "uint16", "uint32")
_CHUNK = 1 << 22  # bytes read at a time for a checksum


@dataclass(frozen=True)
class Shard:
    """A file of tokens: its name in the folder, how many it holds, the checksum of its bytes."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What a folder of shards holds.

    Attributes:
        version: of this format.
        dtype: of a token, as numpy spells it.
        vocab_size: one more than the largest token there can be.
        tokenizer, tokenizer_sha256: which, as the user gave it, and what it gives.
        source: the documents, in words.
        val_percent: share of the documents held out.
        documents: how many on each side.
        train, val: the shards, in order.
    """

    version: int
    dtype: str
    vocab_size: int
    tokenizer: str
    tokenizer_sha256: str
    source: str
    val_percent: float
    documents: dict[str, int]
    train: tuple[Shard, ...]
    val: tuple[Shard, ...]

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self.train + self.val

    @property
    def bytes(self) -> int:
        return sum(shard.tokens for shard in self.shards) * np.dtype(self.dtype).itemsize

    @property
    def sha256(self) -> str:
        """Of all the tokens, by way of the shards' checksums."""
        content = repr([(side, s.tokens, s.sha256) for side in SIDES for s in getattr(self, side)])
        return hashlib.sha256(f"{self.dtype} {content}".encode()).hexdigest()


class ShardedTokens:
    """The tokens of several files as one array, which a slice reads from. Files are mapped when first touched.

    Args:
        folder: of the files.
        shards: in order.
        dtype: of a token.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: str) -> None:
        self.folder, self.files, self.dtype = folder, [shard.file for shard in shards], dtype
        self.starts = np.cumsum([0, *(shard.tokens for shard in shards)])
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        """The tokens [part.start, part.stop) as an array of the stored type; a view where one file has all of them."""
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"slices of tokens have step 1, not {step}")
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        found = []
        while start < stop:
            end = min(stop, int(self.starts[first + 1]))
            origin = int(self.starts[first])
            found.append(self._map(first)[start - origin : end - origin])
            start, first = end, first + 1
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, self.dtype), *found])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # another process maps the files itself

    def _map(self, number: int) -> np.ndarray:
        if number not in self._maps:
            size = int(self.starts[number + 1] - self.starts[number]) * np.dtype(self.dtype).itemsize
            # Unlike numpy's, torch's map keeps no file open: there may be thousands of shards.
            mapped = torch.from_file(str(self.folder / self.files[number]), shared=False, size=size, dtype=torch.uint8)
            self._maps[number] = mapped.numpy().view(self.dtype)
        return self._maps[number]


@dataclass(frozen=True)
class TokenShards:
    """An open folder of shards."""

    folder: Path
    index: Index
    train: ShardedTokens
    val: ShardedTokens


def write_index(folder: Path, index: Index) -> None:
    """Raises: RecipeError: the disk refuses."""
    with replacing(folder / INDEX, DISK_CURE) as file:
        file.write(json.dumps(dataclasses.asdict(index), indent=1).encode())


def read_index(folder: Path) -> Index:
    """The index of a folder.

    Raises:
        RecipeError: it is missing, unreadable, damaged or of another format; says what to do.
    """
    path = folder / INDEX
    try:
        fields = json.loads(path.read_bytes())
        version = fields["version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"its format is version {version}, this program reads version {FORMAT_VERSION}")
        index = Index(**{**fields, **{side: tuple(Shard(**shard) for shard in fields[side]) for side in SIDES}})
        if index.dtype not in _DTYPES or not all(shard.tokens > 0 for shard in index.shards):
            raise ValueError("its numbers make no sense")
        if outside := [shard.file for shard in index.shards if Path(shard.file).name != shard.file or not shard.file]:
            raise ValueError(f"it names {outside[0]!r}, which is no file in its folder")
    except FileNotFoundError as error:
        raise RecipeError(f"there are no token shards in {folder}. They are made at the start of a run.") from error
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}. Make it readable or delete it.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(f"{path} is broken: {error}. {_cure(path)}") from error
    return index


def open_shards(folder: Path) -> TokenShards:
    """The tokens in `folder`; nothing is read but the index.

    Raises:
        RecipeError: as `read_index`.
    """
    index = read_index(folder)
    train, val = (ShardedTokens(folder, shards, index.dtype) for shards in (index.train, index.val))
    return TokenShards(folder, index, train, val)


def check_shard(folder: Path, shard: Shard, dtype: str, *, content: bool) -> None:
    """Compare a file's size with the index, and where `content` also its checksum, which reads all of it.

    Raises:
        RecipeError: the file is missing, unreadable or damaged; says what to do.
    """
    path = folder / shard.file
    damage = shard_damage(path, shard, dtype, content=content)
    if damage:
        raise RecipeError(f"the token shard {path} is broken: {damage}. {_cure(path)}")


def shard_damage(path: Path, shard: Shard, dtype: str, *, content: bool, header: int = 0) -> str | None:
    """What is wrong with a shard's file, which has `header` bytes before the tokens, in words; None: nothing is."""
    try:
        expected, actual = header + shard.tokens * np.dtype(dtype).itemsize, path.stat().st_size
        if actual != expected:
            return f"it has {actual} bytes and the index says {expected}"
        if content and checksum(path) != shard.sha256:
            return "its content does not have the checksum that the index says"
    except FileNotFoundError:
        return "it is gone"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises: OSError: it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _cure(path: Path) -> str:
    return (
        f"Delete {path.name}; the next start makes it anew from data.source (or copy it anew from where it is whole)."
    )
