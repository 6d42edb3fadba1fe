"""From text to tokens: bytes, a byte-level BPE trained here, or any fast tokenizer of the transformers library."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from am_lightning.optional_imports import cause_of
from am_lightning.pretrain.data.hub import from_the_cache_alone, no_answer, offline_text
from am_lightning.pretrain.runtime.atomic_files import replacing
from am_lightning.pretrain.runtime.errors import RecipeError, first_line, needs_package, require

if TYPE_CHECKING:
    import tokenizers

BYTES = "bytes"
BYTE_VOCAB_SIZE = 256
END_OF_TEXT = "<|endoftext|>"
_SMALLEST_BPE = BYTE_VOCAB_SIZE + 1  # every byte and the end of a text
_BPE_FREQUENCY = 2  # a pair seen once is no token
_TOKENIZER_SUFFIXES = {".json", ".model", ".txt"}  # of its files; the weights beside them are others
_BATCH_BYTES = 1 << 20  # text that is encoded at once
_LONG_TEXT = 1 << 20  # characters; a longer document is encoded in pieces, or it would take memory without end

Tag = TypeVar("Tag")

GATED_CURE = (
    "accept its licence on its page on huggingface.co, then hf auth login, or HF_TOKEN in the environment; or set"
    " data.tokenizer to an open one, such as t5-base or bpe-32000"
)
_GATED = ("meta-llama/", "google/gemma")


class Tokenizer(Protocol):
    """What turns documents into tokens; picklable, as other processes do it.

    Attributes:
        name: as the user gave it.
        vocab_size: one more than the largest token.
        end_of_text: the token after every document.
        fingerprint: changes when what `encode` gives does.
    """

    name: str
    vocab_size: int
    end_of_text: int
    fingerprint: str

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """1-D arrays of tokens, without the end of the text."""
        ...


def token_dtype(vocab_size: int) -> str:
    """The smallest unsigned type that holds every token, as numpy spells it."""
    return next(name for name in ("uint8", "uint16", "uint32") if vocab_size - 1 <= np.iinfo(name).max)


def encode_all(tokenizer: Tokenizer, texts: Iterable[tuple[Tag, bytes]]) -> Iterator[tuple[Tag, np.ndarray]]:
    """The tokens of every text with its end-of-text token, in the stored type, beside what the text came with."""
    dtype = token_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.end_of_text], dtype)
    for batch in _batches(texts):
        encoded = tokenizer.encode([text for _, text in batch])
        for (tag, _), tokens in zip(batch, encoded, strict=True):
            yield tag, np.concatenate([tokens.astype(dtype, copy=False), end])


def _batches(texts: Iterable[tuple[Tag, bytes]]) -> Iterator[list[tuple[Tag, bytes]]]:
    batch: list[tuple[Tag, bytes]] = []
    size = 0
    for tagged in texts:
        batch.append(tagged)
        size += len(tagged[1])
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class ByteTokenizer:
    """A token is a byte; NUL, which is in no document, ends one."""

    name = BYTES
    vocab_size = BYTE_VOCAB_SIZE
    end_of_text = 0
    fingerprint = BYTES

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, np.uint8) for text in texts]


class FastTokenizer:
    """A tokenizer of the `tokenizers` library. A text cannot end itself: special tokens in it are text, where the
    model has letters for them, or else (T5's </s> is a word of its vocabulary) left out.

    Args:
        name: as the user gave it.
        backend: the library's; its truncation and padding are turned off.
        end_of_text: the token after every document.
    """

    def __init__(self, name: str, backend: tokenizers.Tokenizer, end_of_text: int) -> None:
        # One thread in each process: there is a process for every core, and forked loaders are not warned of.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        backend.no_truncation()
        backend.no_padding()
        self.name, self.backend, self.end_of_text = name, backend, end_of_text
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = hashlib.sha256(backend.to_str().encode()).hexdigest()

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        self.backend.encode_special_tokens = True  # as text; not part of the pickled state
        dtype = token_dtype(self.vocab_size)
        pieces = [list(_pieces(text.decode("utf-8", "replace"))) for text in texts]
        flat = [piece for text in pieces for piece in text]
        encoded = iter(self.backend.encode_batch_fast(flat, add_special_tokens=False))
        tokens = [np.concatenate([np.asarray(next(encoded).ids, dtype) for _ in text]) for text in pieces]
        return [array[array != self.end_of_text] for array in tokens]


def _pieces(text: str) -> Iterator[str]:
    """`text` cut behind line ends (where there are any) into pieces of at most _LONG_TEXT; mostly one."""
    start = 0
    while len(text) - start > _LONG_TEXT:
        stop = text.rfind("\n", start, start + _LONG_TEXT) + 1 or start + _LONG_TEXT
        yield text[start:stop]
        start = stop
    yield text[start:]


def bpe_size(name: str) -> int | None:
    """N of a tokenizer called "bpe-N", else None."""
    match = re.fullmatch(r"bpe-(\d+)", name)
    return int(match[1]) if match else None


def smallest_vocabulary(name: str) -> int:
    """What a model's vocabulary must have at least, as far as the tokenizer's name tells.

    Raises:
        RecipeError: a BPE of so few tokens cannot be.
    """
    size = bpe_size(name)
    if size is None:
        return BYTE_VOCAB_SIZE if name == BYTES else 2
    require(size >= _SMALLEST_BPE, "data.tokenizer", name, f"bpe-{_SMALLEST_BPE} or more: every byte and one more")
    return size


def check_vocabulary(model: int, tokens: int, tokenizer: str) -> None:
    """Raises: RecipeError: the model has no embedding for some tokens."""
    why = "a token is a byte" if tokenizer == BYTES else f"the tokens of data.tokenizer {tokenizer}"
    require(model >= tokens, "model.vocab_size", model, f">= {tokens}: {why}")


def local_fingerprint(name: str) -> str:
    """Of a tokenizer's name, or of what is in it where it is a folder: cheap, and needs no network."""
    folder = Path(name).expanduser()
    if name == BYTES or bpe_size(name) or not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in _TOKENIZER_SUFFIXES and p.is_file()):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def is_gated(name: str) -> bool:
    """Whether the hub gives this tokenizer only to those who have accepted its licence; of the families known here."""
    return name.startswith(_GATED)


def load_named(name: str) -> Tokenizer:
    """The tokenizer of any name but bpe-N, which is trained on a run's own text. Raises: RecipeError: see below."""
    return ByteTokenizer() if name == BYTES else load_pretrained(name)


def load_pretrained(name: str) -> FastTokenizer:
    """The tokenizer in the local folder or on the hub that transformers.AutoTokenizer loads for `name`.

    Raises:
        RecipeError: it cannot be loaded, is not a fast one or has no end-of-text token.
    """
    where = f"data.tokenizer {name}"
    if name.startswith(("/", "./", "../", "~")):
        require(Path(name).expanduser().is_dir(), "data.tokenizer", name, "a folder that is there, or a name")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        text = f"{where} needs transformers: pip install 'am-lightning[recipes]', or '.[recipes]' in a checkout"
        raise needs_package(text, error, "transformers") from cause_of(error, "transformers")
    offline = None if Path(name).expanduser().is_dir() else no_answer()
    try:
        with contextlib.nullcontext() if offline is None else from_the_cache_alone():
            loaded: Any = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the network's, the hub's, the file's
        if offline is not None:
            raise RecipeError(offline_text(where, offline, "bytes, bpe-N or a folder with a tokenizer")) from error
        raise RecipeError(
            f"{where}: transformers cannot load it ({first_line(error)}). Allowed: bytes, bpe-N (trained"
            " on the data), a folder with a tokenizer, or a name on the Hugging Face hub, which needs a network."
            + (f" It is gated: {GATED_CURE}" if is_gated(name) else "")
        ) from error
    require(loaded.is_fast, "data.tokenizer", name, "one with a tokenizer.json (a fast tokenizer)")
    require(loaded.eos_token_id is not None, "data.tokenizer", name, "one with an eos_token, which ends documents")
    return FastTokenizer(name, loaded.backend_tokenizer, loaded.eos_token_id)


def load_bpe(name: str, path: Path) -> FastTokenizer:
    """A tokenizer that `train_bpe` made.

    Raises:
        RecipeError: the file is gone or broken.
    """
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exceptions
        raise RecipeError(f"the tokenizer {path} is broken or gone ({error}). Delete it and start again.") from error
    return FastTokenizer(name, backend, 0)


def train_bpe(size: int, texts: Iterable[bytes], path: Path) -> None:
    """Train a byte-level BPE of at most `size` tokens (Radford et al. 2019, GPT-2) and write it to `path`.

    The same texts give the same file. Token 0 ends a text.

    Raises:
        RecipeError: the disk refuses.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=_BPE_FREQUENCY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((text.decode("utf-8", "replace") for text in texts), trainer)
    with replacing(path, "Free some space, or set data.cache_dir to a folder on another disk.") as file:
        file.write(backend.to_str().encode())
