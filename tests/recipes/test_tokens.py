"""From documents to the token file, and every way in which that can fail."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from am_lightning.recipes.data import tokens
from am_lightning.recipes.data.corpus import find_corpus, is_validation
from am_lightning.recipes.data.tokens import open_token_file, token_file_name, write_token_file
from am_lightning.recipes.errors import RecipeError

HEADER = 4096


@pytest.fixture
def token_file(corpus_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "data" / "corpus.tokens"
    write_token_file(path, find_corpus(str(corpus_folder)), 5.0)
    return path


def test_the_file_holds_the_documents(corpus_folder: Path, token_file: Path) -> None:
    corpus = find_corpus(str(corpus_folder))
    file = open_token_file(token_file, verify=True)
    for side, held_out in ((file.train, False), (file.val, True)):
        documents = bytes(side).split(b"\0")
        assert documents.pop() == b""  # every document ends with the end-of-text token
        names = [name for name in corpus.names if is_validation(name, 5.0) == held_out]
        assert documents == [(corpus_folder / name).read_bytes() for name in names]
        assert len(names) > 0
    assert len(file.train) + len(file.val) == token_file.stat().st_size - HEADER


def test_the_split_is_disjoint_and_stays_when_files_are_added(corpus_folder: Path) -> None:
    names = find_corpus(str(corpus_folder)).names
    held_out = {name for name in names if is_validation(name, 5.0)}
    assert 0 < len(held_out) < len(names)
    assert held_out <= {name for name in [*names, "new/one.txt"] if is_validation(name, 5.0)}


@given(st.text(min_size=1), st.floats(0.1, 50), st.floats(0.1, 49))
def test_a_larger_split_holds_the_smaller(name: str, percent: float, more: float) -> None:
    assert is_validation(name, percent) <= is_validation(name, percent + more)


def test_about_five_percent_are_held_out() -> None:
    share = sum(is_validation(f"package/module_{i}.py", 5.0) for i in range(10_000)) / 10_000
    assert 0.04 < share < 0.06


def test_the_standard_library_is_source_without_tests() -> None:
    corpus = find_corpus("stdlib")
    assert {"ast.py", "json/decoder.py", "pydoc_data/topics.py"} <= set(corpus.names)
    assert not [n for n in corpus.names if {"test", "tests", "site-packages"} & set(n.split("/")[:-1])]
    assert sum((corpus.root / n).stat().st_size for n in corpus.names) > 5_000_000


def test_binary_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "picture").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_text("text")
    (tmp_path / "empty.txt").touch()
    assert find_corpus(str(tmp_path)).names == ("a.txt",)


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere does not exist.*stdlib"):
        find_corpus(str(tmp_path / "nowhere"))


def test_a_file_is_not_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("text")
    with pytest.raises(RecipeError, match=r"book.txt is a file, not a folder"):
        find_corpus(str(tmp_path / "book.txt"))


def test_an_empty_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"found no text in .*Put text files there"):
        find_corpus(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_document_is_named(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("text")
    (tmp_path / "secret.txt").chmod(0)
    with pytest.raises(RecipeError, match=r"cannot read .*secret.txt"):
        find_corpus(str(tmp_path))


def test_a_document_that_goes_away_is_named(corpus_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text("text")
    corpus = find_corpus(str(tmp_path / "text"))
    (tmp_path / "text" / "7.txt").unlink()
    with pytest.raises(RecipeError, match=r"cannot .*7.txt"):
        write_token_file(tmp_path / "x.tokens", corpus, 5.0)
    assert list(tmp_path.glob("*tokens*")) == []


@pytest.mark.parametrize(("percent", "side"), [(0.0001, "validation"), (99.9999, "training")])
def test_an_empty_split_is_refused(tmp_path: Path, percent: float, side: str) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text("text")
    with pytest.raises(RecipeError, match=rf"none of the 1 files falls into the {side} split.*val_percent"):
        write_token_file(tmp_path / "x.tokens", find_corpus(str(tmp_path / "text")), percent)
    assert list(tmp_path.glob("*tokens*")) == list(tmp_path.glob(".*part")) == []


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _flip(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(HEADER + 100)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def _edit_header(path: Path, **changes: object) -> None:
    block = path.read_bytes()
    magic, rest = block[:HEADER].split(b"\n", 1)
    header = {**json.loads(rest), **changes}
    path.write_bytes((magic + b"\n" + json.dumps(header).encode()).ljust(HEADER) + block[HEADER:])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_truncate, "bytes and its header says"),
        (_flip, "checksum"),
        (lambda p: os.truncate(p, 0), "does not begin with"),
        (lambda p: os.truncate(p, 200), "does not begin with"),
        (lambda p: p.write_bytes(b"x" * 9000), "does not begin with"),
        (lambda p: p.write_bytes(b"AMTOKENS\n" + b"x" * 9000), "header cannot be read"),
        (lambda p: _edit_header(p, version=99), "version 99, this program reads version 1"),
        (lambda p: _edit_header(p, dtype="float32"), "makes no sense"),
        (lambda p: _edit_header(p, train_tokens=-5), "header says|makes no sense"),
        (lambda p: _edit_header(p, surprise=1), "header cannot be read"),
    ],
)
def test_a_broken_file_is_named_with_the_cure(token_file: Path, damage: object, says: str) -> None:
    damage(token_file)  # type: ignore[operator]
    with pytest.raises(RecipeError, match=says) as caught:
        open_token_file(token_file, verify=True)
    assert str(token_file) in str(caught.value)
    assert "Delete it" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone\.tokens is gone"):
        open_token_file(tmp_path / "gone.tokens", verify=True)


def test_the_name_follows_the_corpus_and_the_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    before = find_corpus(str(tmp_path))
    (tmp_path / "b.txt").write_text("more")
    names = {
        token_file_name(before, 5.0),
        token_file_name(find_corpus(str(tmp_path)), 5.0),
        token_file_name(before, 6.0),
    }
    assert len(names) == 3


def _write(source: Path, path: Path) -> None:
    write_token_file(path, find_corpus(str(source)), 5.0)


def test_two_processes_may_write_it_at_the_same_time(corpus_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "shared.tokens"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(corpus_folder, path)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * 4
    open_token_file(path, verify=True)
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, or a limit on the size of a file where only root may mount."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode == 0:
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_names_the_file_and_leaves_nothing(corpus_folder: Path, small_disk: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot write .*corpus\.tokens: .*MB free.*data.cache_dir"):
        write_token_file(small_disk / "corpus.tokens", find_corpus(str(corpus_folder)), 5.0)
    assert list(small_disk.iterdir()) == []


def test_the_file_is_mapped_not_read(token_file: Path) -> None:
    file = open_token_file(token_file, verify=False)
    assert isinstance(file.train, np.memmap)
    assert not file.train.flags.writeable
    assert tokens.END_OF_TEXT == 0
    assert sys.getsizeof(file.train) < 1000
