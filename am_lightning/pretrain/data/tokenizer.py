"""Tokenizers: bytes, a byte-level BPE trained on the data, or any fast tokenizer of the transformers library."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from am_lightning.pretrain.data.hub import hub_errors
from am_lightning.pretrain.data.shards import CACHE_OPTION
from am_lightning.pretrain.runtime.atomic_files import replacing
from am_lightning.pretrain.runtime.errors import RecipeError, require

if TYPE_CHECKING:
    import tokenizers

BYTES = "bytes"
BYTE_VOCAB_SIZE = 256
_SMALLEST_BPE = BYTE_VOCAB_SIZE + 1  # every byte and the end-of-text token
_BPE_FREQUENCY = 2  # a pair that occurs once does not become a token
_TOKENIZER_SUFFIXES = {".json", ".model", ".txt"}  # suffixes of tokenizer files; the folder may also hold weights
_LONG_TEXT = 1 << 20  # characters; a longer document is encoded in pieces to limit the memory

GATED_CURE = (
    "accept its licence on its page on huggingface.co, then hf auth login, or HF_TOKEN in the environment; or set"
    " data.tokenizer to an open one, such as t5-base or bpe-32000"
)
_GATED = ("meta-llama/", "google/gemma")


class ByteTokenizer:
    """A tokenizer whose tokens are the bytes. NUL, which no document contains, is the end-of-text token."""

    name = BYTES
    vocab_size = BYTE_VOCAB_SIZE
    end_of_text = 0
    dtype = "uint8"
    fingerprint = BYTES

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)


class FastTokenizer:
    """A tokenizer of the `tokenizers` library.

    A text cannot contain the end-of-text token. Special tokens in it are encoded as text if the model can spell them.
    Otherwise (T5's </s> is a word of its vocabulary) they are left out.

    Args:
        name: name that the user gave.
        backend: tokenizer of the library. Its truncation and padding are turned off.
        end_of_text: token after every document.

    Attributes:
        vocab_size: one more than the largest token.
        dtype: numpy's name of the type of the tokens.
        fingerprint: a hash that changes with the tokens that `encode` returns.
    """

    def __init__(self, name: str, backend: tokenizers.Tokenizer, end_of_text: int) -> None:
        # One thread is enough because every core has a process. It also avoids a warning in forked loaders.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        backend.no_truncation()
        backend.no_padding()
        self.name, self.backend, self.end_of_text = name, backend, end_of_text
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype = np.min_scalar_type(self.vocab_size - 1).name  # the smallest unsigned type
        self.fingerprint = hashlib.sha256(backend.to_str().encode()).hexdigest()

    def encode(self, text: bytes) -> np.ndarray:
        """Return the tokens of a text, 1-D, without an end-of-text token."""
        self.backend.encode_special_tokens = True  # encode them as text; pickling loses this setting
        pieces = list(_pieces(text.decode("utf-8", "replace")))
        encoded = self.backend.encode_batch_fast(pieces, add_special_tokens=False)
        tokens = np.concatenate([np.asarray(piece.ids, self.dtype) for piece in encoded])
        return np.delete(tokens, tokens == self.end_of_text)


def _pieces(text: str) -> Iterator[str]:
    """Cut `text` into pieces of at most _LONG_TEXT characters, after line ends if possible."""
    start = 0
    while len(text) - start > _LONG_TEXT:
        stop = text.rfind("\n", start, start + _LONG_TEXT) + 1 or start + _LONG_TEXT
        yield text[start:stop]
        start = stop
    yield text[start:]


Tokenizer = ByteTokenizer | FastTokenizer


def encode_document(tokenizer: Tokenizer, text: bytes) -> np.ndarray:
    """Return the tokens of a document and its end-of-text token, 1-D, in the stored type."""
    return np.concatenate([tokenizer.encode(text), np.array([tokenizer.end_of_text], tokenizer.dtype)])


def bpe_size(name: str) -> int | None:
    """Return N of the name "bpe-N", or None for any other name."""
    match = re.fullmatch(r"bpe-(\d+)", name)
    return int(match[1]) if match else None


def smallest_vocabulary(name: str) -> int:
    """Return the smallest vocabulary that a tokenizer's name allows. Raises: RecipeError: if it is too small."""
    size = bpe_size(name)
    if size is None:
        return BYTE_VOCAB_SIZE if name == BYTES else 2
    require(size >= _SMALLEST_BPE, "data.tokenizer", name, f"bpe-{_SMALLEST_BPE} or more: every byte and one more")
    return size


def check_vocabulary(model: int, tokens: int, tokenizer: str) -> None:
    """Raise a RecipeError if the model has no embedding for some tokens."""
    why = "a token is a byte" if tokenizer == BYTES else f"the tokens of data.tokenizer {tokenizer}"
    require(model >= tokens, "model.vocab_size", model, f">= {tokens}: {why}")


def local_fingerprint(name: str) -> str:
    """Return a tokenizer's name, or a hash of its files if it is a folder. This needs no network."""
    folder = Path(name).expanduser()
    if name == BYTES or bpe_size(name) or not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in _TOKENIZER_SUFFIXES and p.is_file()):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def is_gated(name: str) -> bool:
    """Return whether the tokenizer is of a family that the hub gives only to users who accepted its licence."""
    return name.startswith(_GATED)


def is_path(name: str) -> bool:
    """Return whether a tokenizer's name can only be a path. Another name may be a folder, too, or one of the hub's."""
    return name.startswith(("/", "./", "../", "~"))


def load_named(name: str) -> Tokenizer:
    """Load the tokenizer of any name except bpe-N; that of a folder or of the hub with transformers.AutoTokenizer.

    Raises:
        RecipeError: if it cannot be loaded, is not a fast tokenizer or has no end-of-text token.
    """
    if name == BYTES:
        return ByteTokenizer()
    if is_path(name):
        require(Path(name).expanduser().is_dir(), "data.tokenizer", name, "an existing folder, or a name")
    from transformers import AutoTokenizer

    allowed = (
        "Allowed: bytes, bpe-N (trained on the data), a folder with a tokenizer, or a name on the Hugging Face hub,"
        " which needs a network."
    )
    with hub_errors(
        f"data.tokenizer {name}",
        "transformers",
        remote=not Path(name).expanduser().is_dir(),
        hint=f"{allowed} It is gated: {GATED_CURE}" if is_gated(name) else allowed,
        instead="bytes, bpe-N or a folder with a tokenizer",
    ):
        loaded: Any = AutoTokenizer.from_pretrained(name)
    require(loaded.is_fast, "data.tokenizer", name, "a fast tokenizer, which has a tokenizer.json")
    require(loaded.eos_token_id is not None, "data.tokenizer", name, "one with an eos_token, which ends documents")
    return FastTokenizer(name, loaded.backend_tokenizer, loaded.eos_token_id)


def load_bpe(name: str, path: Path) -> FastTokenizer:
    """Load a tokenizer that `train_bpe` made. Raises: RecipeError: if the file is missing or broken."""
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exceptions
        raise RecipeError(f"the tokenizer {path} is missing or broken ({error}). Delete it and start again.") from error
    return FastTokenizer(name, backend, 0)


def train_bpe(size: int, texts: Iterable[bytes], path: Path) -> None:
    """Train a byte-level BPE of at most `size` tokens (Radford et al. 2019, GPT-2) and write it to `path`.

    The same texts give the same file. Token 0 is the end-of-text token.

    Raises:
        RecipeError: if the file cannot be written.
    """
    from tokenizers import ByteLevelBPETokenizer

    backend: Any = ByteLevelBPETokenizer()
    backend.post_processor = None  # it would only change offsets, which are not used
    decoded = (text.decode("utf-8", "replace") for text in texts)
    backend.train_from_iterator(decoded, size, _BPE_FREQUENCY, show_progress=False, special_tokens=["<|endoftext|>"])
    with replacing(path, "Free some space, or set data.cache_dir to a folder on another disk.", CACHE_OPTION) as file:
        file.write(backend.to_str().encode())
