"""Tests of tokenizers."""

from __future__ import annotations

import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast, T5Tokenizer

from am_lightning.pretrain.data import tokenizer as module
from am_lightning.pretrain.data.text_data import TextData
from am_lightning.pretrain.data.tokenizer import (
    ByteTokenizer,
    FastTokenizer,
    check_vocabulary,
    encode_document,
    load_bpe,
    load_named,
    local_fingerprint,
    train_bpe,
)
from am_lightning.pretrain.runtime.errors import RecipeError
from tests.python import PYTHON

SENTENCES = [b"the memory of a step", b"momentum is the memory of many steps", "żółć 日本語 🙂".encode(), b""]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> FastTokenizer:
    path = tmp_path_factory.mktemp("bpe") / "bpe-300.json"
    train_bpe(300, SENTENCES * 20, path)
    return load_bpe("bpe-300", path)


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tokenizer of T5's kind (unigram, spaces as a letter, </s> ends a text) with a small vocabulary."""
    folder = tmp_path_factory.mktemp("t5")
    words = " ".join(text.decode() for text in SENTENCES).split()
    letters = sorted({"▁", *"abcdefghijklmnopqrstuvwxyz", *"".join(words)})
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{w}", -3.0) for w in dict.fromkeys(words))]
    vocab += [(letter, -9.0) for letter in letters if letter not in dict(vocab)]
    T5Tokenizer(vocab=vocab, extra_ids=4).save_pretrained(folder)
    return folder


@given(st.lists(st.text(max_size=40)))
def test_bytes_are_bytes(texts: list[str]) -> None:
    data = [text.encode("utf-8", "replace") for text in texts]
    assert [bytes(ByteTokenizer().encode(text).tolist()) for text in data] == data


@given(st.lists(st.text(max_size=40), max_size=5))
def test_a_bpe_loses_nothing(bpe: FastTokenizer, texts: list[str]) -> None:
    data = [text.encode("utf-8", "replace") for text in texts]
    encoded = [bpe.encode(text) for text in data]
    assert [bpe.backend.decode(tokens.tolist()).encode() for tokens in encoded] == data
    assert all(tokens.max(initial=0) < bpe.vocab_size for tokens in encoded)


def test_a_bpe_merges_what_is_frequent(bpe: FastTokenizer) -> None:
    assert len(bpe.encode(b" memory")) < 4
    assert bpe.vocab_size <= 300
    assert bpe.end_of_text == 0


@pytest.mark.slow
def test_training_gives_the_same_file_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from am_lightning.pretrain.data.tokenizer import train_bpe;"
        f"train_bpe(300, {SENTENCES!r} * 20, Path(sys.argv[1]))"
    )
    for threads in ("1", "2"):
        env = {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true", "PYTHONPATH": str(Path.cwd())}
        subprocess.run([PYTHON, "-c", code, str(tmp_path / threads)], env=env, check=True)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_a_text_cannot_end_itself(bpe: FastTokenizer, t5_folder: Path) -> None:
    """This also holds in another process, although the setting is not pickled."""
    for loaded, end in ((bpe, b"<|endoftext|>"), (load_named(str(t5_folder)), b"a</s>b")):
        for tokenizer in (loaded, pickle.loads(pickle.dumps(loaded))):
            tokens = tokenizer.encode(end)
            assert len(tokens) > 1
            assert tokenizer.end_of_text not in tokens


def test_long_documents_are_encoded_in_pieces(bpe: FastTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONG_TEXT", 16)
    text = b"a line of memory\nand more\n" * 5 + b"x" * 50
    assert bpe.backend.decode(bpe.encode(text).tolist()).encode() == text


def test_a_folder_with_a_tokenizer(t5_folder: Path) -> None:
    tokenizer = load_named(str(t5_folder))
    reference = PreTrainedTokenizerFast.from_pretrained(t5_folder)
    text = "the memory of many steps"
    assert tokenizer.encode(text.encode()).tolist() == reference.encode(text, add_special_tokens=False)
    assert tokenizer.end_of_text == reference.eos_token_id == 1
    assert tokenizer.vocab_size == len(reference)  # including the extra ids, which the model does not have
    assert len(tokenizer.encode(b"the memory " * 2000)) >= 4000  # model_max_length cuts nothing


def test_what_a_tokenizer_cuts_or_pads_is_its_models_business(bpe: FastTokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=9, pad_id=7)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(tmp_path)
    text = b"momentum is the memory of many steps"
    assert load_named(str(tmp_path)).encode(text).tolist() == bpe.encode(text).tolist()
    assert load_named(str(tmp_path)).encode(b"a").tolist() == bpe.encode(b"a").tolist()


def test_every_document_ends(bpe: FastTokenizer) -> None:
    encoded = [encode_document(bpe, text) for text in SENTENCES]
    assert all(tokens[-1] == 0 and tokens.dtype == np.uint16 for tokens in encoded)
    assert encoded[3].tolist() == [0]


@pytest.mark.parametrize(("size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_the_stored_type_is_the_smallest(size: int, dtype: str) -> None:
    vocabulary = {str(token): token for token in range(size)}
    assert FastTokenizer("x", tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "0")), 0).dtype == dtype


def test_a_fingerprint_follows_what_is_in_a_folder(t5_folder: Path, tmp_path: Path) -> None:
    assert local_fingerprint("google-t5/t5-base") != local_fingerprint("google-t5/t5-small")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_bytes((t5_folder / "tokenizer.json").read_bytes())
    assert local_fingerprint(str(tmp_path / "a")) == local_fingerprint(str(tmp_path / "b"))
    (tmp_path / "a" / "model.safetensors").write_text("weights")
    assert local_fingerprint(str(tmp_path / "a")) == local_fingerprint(str(tmp_path / "b"))
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    assert local_fingerprint(str(tmp_path / "a")) != local_fingerprint(str(tmp_path / "b"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vocab_size": 255}, r"model.vocab_size is 255; allowed: >= 256: a token is a byte"),
        ({"vocab_size": 256, "tokenizer": "bpe-4096"}, r"model.vocab_size is 256; allowed: >= 4096: .*bpe-4096"),
        ({"tokenizer": "bpe-200"}, r"data.tokenizer is 'bpe-200'; allowed: bpe-257 or more"),
    ],
)
def test_a_wrong_vocabulary_is_named_at_once(options: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        TextData(**options)  # type: ignore[arg-type]


def test_the_vocabulary_of_a_folder_is_looked_up(t5_folder: Path, corpus_folder: Path, tmp_path: Path) -> None:
    size = load_named(str(t5_folder)).vocab_size
    options = {"tokenizer": str(t5_folder), "cache_dir": str(tmp_path)}
    small = TextData(str(corpus_folder), vocab_size=size - 1, **options)
    with pytest.raises(RecipeError, match=rf"model.vocab_size is {size - 1}; allowed: >= {size}: .*{t5_folder}"):
        small.prepare()
    assert not list(tmp_path.rglob("*.bin"))
    TextData(str(corpus_folder), vocab_size=size, **options).prepare()
    with pytest.raises(RecipeError, match=rf"model.vocab_size is {size - 1}; allowed: >= {size}"):
        small.prepare()  # also if the shards exist
    with pytest.raises(RecipeError, match=rf"model.vocab_size is {size - 1}; allowed: >= {size}"):
        small.open()
    with pytest.raises(RecipeError, match=r"is 9; allowed: >= 10: the tokens of data.tokenizer x"):
        check_vocabulary(9, 10, "x")


def test_what_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        RecipeError,
        match=r"tokenizer no/such is missing or incomplete in this machine's cache, and HF_HUB_OFFLINE is set.*bpe-N",
    ):
        load_named("no/such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"empty: transformers cannot load it"):
        load_named(str(tmp_path / "empty"))
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(RecipeError, match=r"data.tokenizer is .*endless'; allowed: one with an eos_token"):
        load_named(str(tmp_path / "endless"))
    (tmp_path / "bpe.json").write_text("{")
    with pytest.raises(RecipeError, match=r"the tokenizer .*bpe.json is missing or broken"):
        load_bpe("bpe-300", tmp_path / "bpe.json")
