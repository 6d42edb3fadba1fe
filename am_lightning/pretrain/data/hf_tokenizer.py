"""Convert a run's tokenizer to one of transformers that gives the token ids of training."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from am_lightning.pretrain.data.tokenizer import ByteTokenizer, Tokenizer

_END = "\0"  # the end-of-text token of ByteTokenizer


def as_pretrained(tokenizer: Tokenizer, seq_len: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer that gives the same ids for the same text and adds no special tokens.

    In training, an end-of-text token follows each document, but a prompt must not end with it, as T5's tokenizer does.

    Args:
        tokenizer: tokenizer of the data.
        seq_len: tokens of the longest row that the model was trained on.
    """
    made = _of_bytes() if isinstance(tokenizer, ByteTokenizer) else tokenizer.backend
    backend = tokenizers.Tokenizer.from_str(made.to_str())
    backend.post_processor = processors.Sequence([])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        eos_token=backend.id_to_token(tokenizer.end_of_text),
        model_max_length=seq_len,
        model_input_names=["input_ids", "attention_mask"],  # transformers 4 would add token types
        clean_up_tokenization_spaces=False,
    )


def _of_bytes() -> Any:
    """Return a byte-level BPE without merges, whose ids are the bytes.

    Such a model spells every byte as a letter. NUL is a special token because its letter may occur in a text.
    """
    letters: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    vocabulary = {letter: byte for byte, letter in letters.items() if byte} | {_END: 0}
    backend = tokenizers.ByteLevelBPETokenizer(vocabulary, [])
    backend.add_special_tokens([_END])
    return backend
