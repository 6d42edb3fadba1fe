"""The packed token file: every document as bytes, one end-of-text token after each, training documents first.

    bytes 0 - 4095      "AMTOKENS\\n", then the header as one line of JSON, filled up with spaces
    from byte 4096      the training tokens, then the validation tokens

A row of training data is `seq_len` tokens in a row; documents are not aligned to rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from am_lightning.recipes.data.corpus import Corpus
from am_lightning.recipes.errors import RecipeError
from am_lightning.recipes.files import replacing

FORMAT_VERSION = 1
END_OF_TEXT = 0  # NUL is in no document
VOCAB_SIZE = 256
_MAGIC = b"AMTOKENS\n"
_HEADER_BYTES = 4096
_DTYPE = "uint8"
_CHUNK = 1 << 22  # bytes read at a time for the checksum


@dataclass(frozen=True)
class Header:
    """What the file holds.

    Attributes:
        version: of this format.
        dtype: of a token, as numpy spells it.
        train_tokens, val_tokens: how many.
        sha256: of everything after the header.
        source, fingerprint, val_percent: the corpus and the split it was made of.
    """

    version: int
    dtype: str
    train_tokens: int
    val_tokens: int
    sha256: str
    source: str
    fingerprint: str
    val_percent: float


@dataclass(frozen=True)
class TokenFile:
    """An open token file: 1-D memory maps of the two parts, and the header."""

    path: Path
    header: Header
    train: np.ndarray
    val: np.ndarray


def token_file_name(corpus: Corpus, val_percent: float) -> str:
    """A name that changes with the corpus and the split, so that a run never meets another corpus's tokens."""
    key = f"{FORMAT_VERSION} {corpus.fingerprint} {val_percent}"
    return f"bytes-{hashlib.sha256(key.encode()).hexdigest()[:16]}.tokens"


def write_token_file(path: Path, corpus: Corpus, val_percent: float) -> None:
    """Pack `corpus` into `path`, at once whole: two processes may do this at the same time.

    Raises:
        RecipeError: the disk is full or the folder cannot be written, a document cannot be read, or one side of the
            split is empty.
    """
    cure = "Free some space, or set data.cache_dir to a folder on another disk."
    with replacing(path, cure) as file:
        file.write(b" " * _HEADER_BYTES)
        digest = hashlib.sha256()
        counts = [
            _pack(file, digest, corpus.documents(validation=validation, percent=val_percent))
            for validation in (False, True)
        ]
        if not all(counts):
            raise _empty_split(corpus, val_percent, ("training", "validation")[counts.index(0)])
        header = Header(
            FORMAT_VERSION, _DTYPE, *counts, digest.hexdigest(), corpus.description, corpus.fingerprint, val_percent
        )
        file.seek(0)
        file.write(_encode(header))


def open_token_file(path: Path, *, verify: bool) -> TokenFile:
    """Map the file's two parts into memory, read-only.

    Args:
        path: the file.
        verify: also read all of it and compare the checksum.

    Raises:
        RecipeError: the file is missing, truncated, damaged or of another format; says what to do.
    """
    try:
        header = _decode(path)
        count = header.train_tokens + header.val_tokens
        expected = _HEADER_BYTES + count * np.dtype(header.dtype).itemsize
        actual = path.stat().st_size
        if actual != expected:
            raise ValueError(f"it has {actual} bytes and its header says {expected}")
        if verify and _checksum(path) != header.sha256:
            raise ValueError("its content does not have the checksum that its header says")
    except FileNotFoundError as error:
        raise RecipeError(f"the token file {path} is gone. Start again: it is made at the start of a run.") from error
    except OSError as error:
        text = f"cannot read the token file {path}: {error.strerror}"
        raise RecipeError(f"{text}. Make it readable or delete it.") from error
    except ValueError as error:
        raise RecipeError(
            f"the token file {path} is broken: {error}. Delete it; the next start makes it anew from data.source."
        ) from error
    tokens = np.memmap(path, dtype=header.dtype, mode="r", offset=_HEADER_BYTES, shape=(count,))
    return TokenFile(path, header, tokens[: header.train_tokens], tokens[header.train_tokens :])


def _pack(file: BinaryIO, digest: hashlib._Hash, documents: Iterable[bytes]) -> int:
    count = 0
    for document in documents:
        text = document + bytes([END_OF_TEXT])
        file.write(text)
        digest.update(text)
        count += len(text)
    return count


def _encode(header: Header) -> bytes:
    line = _MAGIC + json.dumps(dataclasses.asdict(header)).encode()
    if len(line) >= _HEADER_BYTES:
        raise RecipeError(f"the path in data.source is too long for the token file's header: {header.source}")
    return line.ljust(_HEADER_BYTES - 1) + b"\n"


def _decode(path: Path) -> Header:
    with open(path, "rb") as file:
        block = file.read(_HEADER_BYTES)
    if len(block) < _HEADER_BYTES or not block.startswith(_MAGIC):
        raise ValueError("it does not begin with a token file's header")
    try:
        fields = json.loads(block[len(_MAGIC) :])
        version = fields["version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"its format is version {version}, this program reads version {FORMAT_VERSION}")
        header = Header(**fields)
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"its header cannot be read ({error})") from error
    if header.dtype != _DTYPE or min(header.train_tokens, header.val_tokens) < 1:
        raise ValueError(f"its header makes no sense: {header}")
    return header


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(_HEADER_BYTES)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _empty_split(corpus: Corpus, val_percent: float, side: str) -> RecipeError:
    return RecipeError(
        f"{corpus.description}: none of the {len(corpus.names)} files falls into the {side} split"
        f" (data.val_percent is {val_percent}; a file's path decides). Use more files, or change data.val_percent."
    )
