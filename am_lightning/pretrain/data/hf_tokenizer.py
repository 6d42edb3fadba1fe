"""A run's tokenizer as transformers takes it, with the ids that the model was trained on."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from am_lightning.pretrain.data.tokenizer import ByteTokenizer, FastTokenizer, Tokenizer

_END = "\0"  # ByteTokenizer's end of a text, as a text


def as_pretrained(tokenizer: Tokenizer, seq_len: int) -> PreTrainedTokenizerFast:
    """The same ids for the same text, and nothing before or after it: rows of training have no more than an end of
    text behind each document, where some tokenizers (T5's) would end a prompt with it.

    Args:
        tokenizer: of the data.
        seq_len: longest row, in tokens, that the model was trained on.
    """
    if isinstance(tokenizer, ByteTokenizer):
        backend = _of_bytes()
    elif isinstance(tokenizer, FastTokenizer):
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    else:
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; allowed: ByteTokenizer, FastTokenizer")
    backend.post_processor = processors.Sequence([])
    make: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = make(
        tokenizer_object=backend,
        eos_token=backend.id_to_token(tokenizer.end_of_text),
        model_max_length=seq_len,
        model_input_names=["input_ids", "attention_mask"],  # transformers 4 gives types of tokens, too
        clean_up_tokenization_spaces=False,
    )
    return made


def _of_bytes() -> tokenizers.Tokenizer:
    """A byte-level BPE without merges, whose ids are the bytes.

    Such a model spells every byte as a letter. NUL is a special token instead, because its letter is one of some texts.
    """
    letters: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    vocabulary = {letter: byte for byte, letter in letters.items() if byte} | {_END: 0}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_END])
    return backend
