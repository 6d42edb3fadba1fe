"""Token shards: files that hold tokens and nothing else, in one folder with an index.

    index.json              written last: a folder that has it is complete
    train-00012-00.bin      training tokens of work unit 12; -01 if there are too many for one file
    val-00012-00.bin        held-out tokens of work unit 12
    parts/00012-KEY.json    index of the files of work unit 12; a second call does not write them again

The training tokens are those of all `train` files, one after the other, in the order of the index. An end-of-text token
follows every document. A row is `seq_len` consecutive tokens. Neither documents nor shards are aligned to rows.
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

from am_lightning.pretrain.runtime.atomic_files import checksum, replacing
from am_lightning.pretrain.runtime.errors import RecipeError

FORMAT_VERSION = 2
INDEX = "index.json"
CHUNKS = "chunks.json"  # index of a folder of litdata chunks, whose own index is called index.json
SIDES = ("train", "val")
DISK_HINT = "Free some space, or set data.cache_dir to a folder on another disk. The same command resumes from here."
CACHE_OPTION = "--data.cache_dir DIR"
_DTYPES = ("uint8", "uint16", "uint32")


@dataclass(frozen=True)
class Shard:
    """A file of tokens: its name in the folder, its number of tokens and the SHA-256 of its bytes.

    Raises:
        ValueError: if the name is a path that may leave the folder.
    """

    file: str
    tokens: int
    sha256: str

    def __post_init__(self) -> None:
        if Path(self.file).name != self.file or not self.file:
            raise ValueError(f"it names {self.file!r}, which is not a file in its folder")


@dataclass(frozen=True)
class Index:
    """Contents of a folder of shards.

    Attributes:
        version: version of this format.
        dtype: numpy's name of a token's type.
        vocab_size: one more than the largest possible token.
        tokenizer, tokenizer_sha256: the tokenizer's name as the user gave it, and its fingerprint.
        source: description of the documents.
        val_percent: share of the documents that is held out, in percent.
        documents: number of documents on each side.
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
        """A hash of all tokens, computed from the checksums of the shards."""
        content = repr([(side, s.tokens, s.sha256) for side in SIDES for s in getattr(self, side)])
        return hashlib.sha256(f"{self.dtype} {content}".encode()).hexdigest()


class ShardedTokens:
    """The tokens of several files as one array, of which slices can be read. A file is mapped when it is first read.

    Args:
        folder: folder of the files.
        shards: the files, in order.
        dtype: type of a token.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: str) -> None:
        self.folder, self.files, self.dtype = folder, [shard.file for shard in shards], dtype
        self.starts = np.cumsum([0, *(shard.tokens for shard in shards)])
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return tokens as an array of the stored type: a view if one file has all of them, else a copy."""
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"the step of a slice of tokens is {step}; allowed: 1")
        files = range(int(np.searchsorted(self.starts, start, "right")) - 1, int(np.searchsorted(self.starts, stop)))
        found = [self._map(file)[max(0, start - self.starts[file]) : stop - self.starts[file]] for file in files]
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, self.dtype), *found])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # another process maps the files again

    def _map(self, number: int) -> np.ndarray:
        if number not in self._maps:
            size = int(self.starts[number + 1] - self.starts[number]) * np.dtype(self.dtype).itemsize
            # Unlike numpy's map, torch's keeps no file open. There may be thousands of shards.
            mapped = torch.from_file(str(self.folder / self.files[number]), shared=False, size=size, dtype=torch.uint8)
            self._maps[number] = mapped.numpy().view(self.dtype)
        return self._maps[number]


def write_index(path: Path, index: Index) -> None:
    """Write an index. Raises: RecipeError: if the file cannot be written."""
    with replacing(path, DISK_HINT, CACHE_OPTION) as file:
        file.write(json.dumps(dataclasses.asdict(index), indent=1).encode())


def read_index(folder: Path, name: str = INDEX) -> Index:
    """Read the index of a folder. Raises: RecipeError: if it is missing, unreadable, damaged or of another format."""
    path = folder / name
    try:
        fields = json.loads(path.read_bytes())
        version = fields["version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"its format is version {version}, this program reads version {FORMAT_VERSION}")
        index = Index(**{**fields, **{side: tuple(Shard(**shard) for shard in fields[side]) for side in SIDES}})
        if index.dtype not in _DTYPES or not all(shard.tokens > 0 for shard in index.shards):
            raise ValueError("its numbers are impossible")
    except FileNotFoundError as error:
        raise RecipeError(
            f"there are no token shards in {folder}: {name} is missing. A run or TextData.prepare() makes them."
        ) from error
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}. Make it readable or delete it.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(f"{path} is broken: {error}. {rebuild_hint(path)}") from error
    return index


def shard_damage(path: Path, shard: Shard, dtype: str, *, content: bool, header: int = 0) -> str | None:
    """Return a description of the damage to a shard's file, or None. `header` is the bytes before the tokens."""
    try:
        expected, actual = header + shard.tokens * np.dtype(dtype).itemsize, path.stat().st_size
        if actual != expected:
            return f"it has {actual} bytes, its index gives {expected}"
        if content and checksum(path) != shard.sha256:
            return "its content does not have the checksum of the index"
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None


def rebuild_hint(path: Path) -> str:
    """Return what to do about a broken file, for the end of an error."""
    return f"Delete {path.name}; the next start rebuilds it from data.source (or copy it again from an intact folder)."
