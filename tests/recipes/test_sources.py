"""From the user's sources to documents, and every way in which that can fail."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from am_lightning.pretrain.data.chunks import Document, TextFile
from am_lightning.pretrain.data.prepare import work_units
from am_lightning.pretrain.data.sources import Source, find_source
from am_lightning.pretrain.runtime.errors import RecipeError
from tests.examples import examples

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

# Not ASCII, a NUL, half a surrogate pair (JSON can hold one), line ends inside a text, an empty text.
TEXTS = ["plain", "żółć 日本語 🙂", "a\0b", "half \ud83d of it", "two\nlines\r\n", "", " "]
KEPT = [b"plain", "żółć 日本語 🙂".encode(), b"ab", b"half ? of it", b"two\nlines\r\n", b" "]


def texts(source: Source, chunk_bytes: int = 1 << 20) -> list[bytes]:
    """Return texts through pickled chunks, as another process gets them."""
    chunks = pickle.loads(pickle.dumps(list(source.chunks(chunk_bytes))))
    return [document.text for chunk in chunks for document in chunk.documents()]


def write_jsonl(path: Path, records: list[Any], field: str = "text") -> Path:
    lines = [json.dumps(record if isinstance(record, dict) else {"id": 1, field: record}) for record in records]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, records: list[str | None], field: str = "text", rows: int = 3) -> Path:
    table = pa.table({"id": list(range(len(records))), field: records})
    pq.write_table(table, path, row_group_size=rows)
    return path


def test_the_standard_library_is_source_without_tests() -> None:
    size = {chunk.name: chunk.size for chunk in find_source("stdlib").chunks(1) if isinstance(chunk, TextFile)}
    assert {"ast.py", "json/decoder.py", "pydoc_data/topics.py"} <= size.keys()
    assert not [name for name in size if {"test", "tests", "site-packages"} & set(name.split("/")[:-1])]
    assert sum(size.values()) > 5_000_000


def test_binary_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "picture").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_text("text")
    (tmp_path / "empty.txt").touch()
    assert texts(find_source(str(tmp_path))) == [b"text"]


def test_a_folder_a_file_and_a_glob(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.txt", "a/3.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(find_source(str(tmp_path))) == [b"a/1.txt", b"a/3.md", b"b/2.txt"]
    assert texts(find_source(str(tmp_path / "a" / "3.md"))) == [b"a/3.md"]
    assert texts(find_source(str(tmp_path / "**" / "*.txt"))) == [b"a/1.txt", b"b/2.txt"]


def test_records_and_text_may_lie_together(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    write_parquet(tmp_path / "b.parquet", ["three"])
    write_jsonl(tmp_path / "c.json.gz", ["four"])
    (tmp_path / "d.json").write_text('{"text": "a text file like any other"}')
    assert texts(find_source(str(tmp_path)))[:4] == [b"one", b"two", b"three", b"four"]
    assert len(texts(find_source(str(tmp_path)))) == 5


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_strange_texts_arrive(tmp_path: Path, name: str) -> None:
    if name == "x.parquet":
        kept = [t for t in TEXTS if "\ud83d" not in t]  # parquet is UTF-8
        write_parquet(tmp_path / name, [*kept, None], rows=2)
        assert texts(find_source(str(tmp_path / name))) == [k for k in KEPT if b"half" not in k]
    else:
        write_jsonl(tmp_path / name, [*TEXTS, None])
        assert texts(find_source(str(tmp_path / name))) == KEPT


@given(
    documents=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=12),
    size=st.integers(1, 60),
)
@examples(60)
def test_a_line_is_in_one_piece_wherever_files_are_cut(
    documents: list[str], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write_jsonl(tmp_path_factory.mktemp("lines") / "x.jsonl", documents)
    expected = [kept for text in documents if (kept := text.encode().replace(b"\0", b""))]
    assert texts(find_source(str(path)), size) == expected


def test_a_line_is_in_one_piece_at_every_size(tmp_path: Path) -> None:
    """Some cuts are at the beginning of a line, which few random sizes are."""
    path = write_jsonl(tmp_path / "x.jsonl", ["0", "11", "2"])
    for size in range(1, 2 * path.stat().st_size):
        assert texts(find_source(str(path)), size) == [b"0", b"11", b"2"]


def test_a_file_without_a_last_line_end_and_with_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n{"text": "two"}')
    for size in range(1, 50):
        assert texts(find_source(str(tmp_path / "x.jsonl")), size) == [b"one", b"two"]


def test_parquet_is_cut_at_row_groups(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [str(i) for i in range(10)], rows=4)
    assert len(list(find_source(str(path)).chunks(1))) == 3
    assert texts(find_source(str(path))) == [str(i).encode() for i in range(10)]


@pytest.mark.parametrize("builder", ["json", "parquet"])
def test_the_datasets_library_streams(tmp_path: Path, builder: str) -> None:
    for number in range(3):
        documents = [f"{number} {i} ż" for i in range(4)] + [""]
        if builder == "json":
            write_jsonl(tmp_path / f"{number}.jsonl", documents, "content")
        else:
            write_parquet(tmp_path / f"{number}.parquet", documents, "content")
    files = sorted(str(path) for path in tmp_path.iterdir())
    source = find_source(f"hf:{builder}", text_field="content", options={"data_files": files})
    assert len(list(source.chunks(1))) == 3
    assert texts(source) == [f"{number} {i} ż".encode() for number in range(3) for i in range(4)]
    assert source.description == f"hf:{builder}"


def test_chunks_are_grouped_in_order(tmp_path: Path) -> None:
    for number, size in enumerate([30, 30, 50, 200, 10, 10]):
        (tmp_path / f"{number}.txt").write_text("x" * size)
    units = work_units(find_source(str(tmp_path)), 100)
    assert [[chunk.size for chunk in unit] for unit in units] == [[30, 30], [50], [200], [10, 10]]


def test_a_fingerprint_follows_the_files_and_the_field(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    before = find_source(str(tmp_path)).fingerprint
    assert find_source(str(tmp_path)).fingerprint == before
    assert find_source(str(tmp_path), text_field="other").fingerprint != before
    os.utime(path, (1, 1))
    assert find_source(str(tmp_path)).fingerprint != before
    prints = {
        find_source("hf:json", options=options, text_field=field).fingerprint
        for options in (None, {"name": "en"}, {"name": "de"})
        for field in ("text", "content")
    }
    assert len(prints) == 6


def test_the_split_is_of_paths_and_of_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    write_jsonl(tmp_path / "b.jsonl", ["same", "same", "other"])
    documents = [d for chunk in find_source(str(tmp_path)).chunks(1 << 20) for d in chunk.documents()]
    assert [document.key for document in documents] == [b"a.txt", b"same", b"same", b"other"]


@given(st.binary(min_size=1), st.floats(0.1, 50), st.floats(0.1, 49))
def test_a_larger_split_holds_the_smaller(key: bytes, percent: float, more: float) -> None:
    document = Document(b"", key)
    assert document.is_validation(percent) <= document.is_validation(percent + more)


def test_about_five_percent_are_held_out() -> None:
    share = sum(Document(b"", f"package/module_{i}.py".encode()).is_validation(5.0) for i in range(10_000)) / 10_000
    assert 0.04 < share < 0.06


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            b'{"content": "x", "id": 3}\n',
            r"data.text_field text is not in the line at byte 0 of .*x.jsonl, which has content, id",
        ),
        (b'{"text": "x"}\n["text"]\n', r"not in the line at byte 14 of .*, which is a list"),
        (b'{"text": "x"}\n{"text": "y"\n', r"x.jsonl: the line at byte 14 is not JSON"),
        (b'{"text": "x"}\n\xff\xfe\n', r"x.jsonl: the line at byte 14 is not JSON"),
        (b'{"text": {"a": 1}}\n', r"the line at byte 0 of .*x.jsonl: the text is a dict, not a string"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(RecipeError, match=says):
        texts(find_source(str(tmp_path / "x.jsonl")))


def test_a_wrong_column_is_named_before_anything_is_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", ["a"], "content")
    with pytest.raises(RecipeError, match=r"text is not in .*x.parquet, which has id, content"):
        list(find_source(str(path)).chunks(1))
    write_jsonl(tmp_path / "x.jsonl", ["a"], "content")
    with pytest.raises(RecipeError, match=r"text is not in file 0 of hf:json, which has id, content"):
        texts(find_source("hf:json", options={"data_files": str(tmp_path / "x.jsonl")}))


def test_broken_files_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [f"{i} text" for i in range(2000)], rows=1000)
    source = find_source(str(path))
    chunks = list(source.chunks(1))
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * (len(data) // 2) + data[4 + len(data) // 2 :])
    with pytest.raises(RecipeError, match=r"cannot read .*x.parquet"):
        [list(chunk.documents()) for chunk in chunks]
    path.write_bytes(b"not parquet at all")
    with pytest.raises(RecipeError, match=r"cannot read .*x.parquet"):
        texts(find_source(str(path)))
    packed = write_jsonl(tmp_path / "x.jsonl.gz", ["a" * 1000])
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(RecipeError, match=r"cannot read .*x.jsonl.gz"):
        texts(find_source(str(packed)))


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere does not exist. Allowed: .*stdlib.*folder.*hf:NAME"):
        find_source(str(tmp_path / "nowhere"))
    for empty in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(RecipeError, match=r"found no text in .*Put text files there"):
            find_source(str(empty))
    with pytest.raises(RecipeError, match=r"hf:json: the datasets library cannot load it .*data.source_options"):
        texts(find_source("hf:json", options={"data_files": str(tmp_path / "none.jsonl")}))
    with pytest.raises(RecipeError, match=r"data.source_options is .*allowed: null, because data.source stdlib"):
        find_source("stdlib", options={"name": "en"})
    with pytest.raises(RecipeError, match=r"data.source_options is .*no streaming"):
        find_source("hf:json", options={"streaming": False})


@pytest.mark.parametrize("name", ["secret.txt", "secret"])
def test_what_may_not_be_read_is_named_and_not_passed_over(nobodys_folder: Path, name: str) -> None:
    (nobodys_folder / "secret").mkdir()
    for path in ("a.txt", "secret.txt", "secret/b.txt"):
        (nobodys_folder / path).write_text("text")
    (nobodys_folder / name).chmod(0)
    with pytest.raises(RecipeError, match=rf"cannot read .*/{name}: Permission denied. Make it readable"):
        find_source(str(nobodys_folder))
    (nobodys_folder / name).chmod(0o700)


def test_a_document_that_goes_away_is_named(tmp_path: Path) -> None:
    (tmp_path / "7.txt").write_text("text")
    chunks = list(find_source(str(tmp_path)).chunks(1))
    (tmp_path / "7.txt").unlink()
    with pytest.raises(RecipeError, match=r"cannot read .*7.txt: No such file"):
        [list(chunk.documents()) for chunk in chunks]
