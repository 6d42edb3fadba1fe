"""Rows straight from the documents: every reader knows where it is."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from am_lightning.pretrain.data.prepare import WorkUnit
from am_lightning.pretrain.data.stream import Position, Reader
from am_lightning.pretrain.data.text_data import TextData
from am_lightning.pretrain.data.tokenizer import ByteTokenizer
from am_lightning.pretrain.runtime.errors import RecipeError

from .chunks import Texts

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SEQ_LEN = 16
documents = st.lists(
    st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\0", b"")), max_size=6), min_size=1, max_size=4
)


def reader(texts: list[list[bytes]], number: int = 0, readers: int = 1, percent: float = 20.0) -> Reader:
    parts = tuple(WorkUnit(i, (Texts(tuple(part)),), str(i)) for i, part in enumerate(texts))
    return Reader(parts, ByteTokenizer(), percent, SEQ_LEN, 0, number, readers)


@given(texts=documents, rows=st.integers(1, 40), begin=st.integers(0, 39))
@example(texts=[[bytes(range(65, 105))]], rows=6, begin=2)  # rows end twice in one document
def test_a_position_is_all_that_a_resume_needs(texts: list[list[bytes]], rows: int, begin: int) -> None:
    kept = [d for part in reader(texts).parts for d in part.documents() if not d.is_validation(20.0)]
    if not kept:
        with pytest.raises(RecipeError, match=r"a whole pass over data.source gave no text"):
            next(reader(texts).rows(Position()))
        return
    whole = list(itertools.islice(reader(texts).rows(Position()), rows))
    begin = min(begin, rows)
    position = whole[begin - 1][1] if begin else Position()
    plain = Position(*json.loads(json.dumps(position)))  # as a checkpoint holds it
    rest = list(itertools.islice(reader(texts).rows(plain), rows - begin))
    assert [(row.tolist(), behind) for row, behind in rest] == [(row.tolist(), behind) for row, behind in whole[begin:]]


@given(texts=documents, passes=st.integers(1, 3))
def test_a_pass_has_every_training_document_once(texts: list[list[bytes]], passes: int) -> None:
    kept = [d.text for part in reader(texts).parts for d in part.documents() if not d.is_validation(20.0)]
    tokens = sum(len(text) + 1 for text in kept) * passes
    if not kept:
        return
    rows = itertools.islice(reader(texts).rows(Position()), -(-tokens // SEQ_LEN))
    stream = bytes(np.concatenate([row for row, _ in rows])[:tokens])
    assert Counter(stream.split(b"\0")[:-1]) == Counter(kept * passes)


def test_readers_share_the_parts_of_every_pass() -> None:
    texts = [[b"%d" % i + b"." * 14] for i in range(7)]  # a part is a row of 16 tokens
    for readers in (1, 2, 3, 7):
        streams = [
            [bytes(row[:1]) for row, _ in itertools.islice(reader(texts, n, readers, 0.0).rows(Position()), 7)]
            for n in range(readers)
        ]
        merged = [row for slot in zip(*streams, strict=True) for row in slot]
        first, second = merged[:7], merged[7:14]
        assert sorted(first) == [b"%d" % i for i in range(7)]
        if readers > 1:
            assert sorted(second) == sorted(first)
            assert second != first  # every pass has its own order
    assert merged[:7] == [bytes(row[:1]) for row, _ in itertools.islice(reader(texts, 0, 1, 0.0).rows(Position()), 7)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight parquet files of 40 short documents."""
    folder = tmp_path_factory.mktemp("parquet")
    for number in range(8):
        texts = [f"document {i} of file {number}, about memory " * (1 + i % 5) for i in range(40)]
        pq.write_table(pa.table({"text": texts}), folder / f"{number}.parquet")
    return folder


def stream(source: Path, cache: Path, **options: Any) -> TextData:
    hub = {"data_files": sorted(str(path) for path in source.iterdir())}
    defaults = {"val_rows": 4, "final_val_rows": 8, "mode": "stream", "cache_dir": str(cache), "seq_len": SEQ_LEN}
    data = TextData("hf:parquet", hub, **{**defaults, **options})
    data.prepare()
    data.open()
    return data


def take(data: TextData, count: int, **options: Any) -> list[torch.Tensor]:
    return list(itertools.islice(data.train_loader(**{"steps": 30, **options}), count))


@pytest.mark.filterwarnings("ignore:.*suggested max number of worker.*")
@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (1, 2), (3, 1), (2, 2)])
def test_a_resume_is_exact_with_workers_that_read_ahead(
    source: Path, tmp_path: Path, workers: int, accumulate: int
) -> None:
    options = {"num_workers": workers}
    whole = take(stream(source, tmp_path, **options), 30 * accumulate, accumulate=accumulate)
    assert len(whole) == 30 * accumulate
    assert {tuple(batch.shape) for batch in whole} == {(8 // accumulate, SEQ_LEN)}
    first = stream(source, tmp_path, **options)
    begun = take(first, 7 * accumulate, accumulate=accumulate)
    state = json.loads(json.dumps(first.state_dict()))
    assert state["stream"]["step"] == 7
    second = stream(source, tmp_path, **options)
    second.load_state_dict(state)
    rest = take(second, 99, accumulate=accumulate, first_step=7)
    assert len(rest) == 23 * accumulate
    assert all(torch.equal(a, b) for a, b in zip([*begun, *rest], whole, strict=True))
    assert second.state_dict()["stream"]["step"] == 30


def test_one_worker_reads_what_none_reads(source: Path, tmp_path: Path) -> None:
    a, b = (take(stream(source, tmp_path, num_workers=workers), 20) for workers in (0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    first = stream(source, tmp_path, num_workers=1)
    take(first, 5)
    second = stream(source, tmp_path, num_workers=0)
    second.load_state_dict(first.state_dict())
    assert torch.equal(take(second, 1, first_step=5)[0], a[5])


def test_a_checkpoint_in_the_middle_of_a_step_is_that_of_its_beginning(source: Path, tmp_path: Path) -> None:
    """Its gradients are lost, so its micro-batches are read again."""
    data = stream(source, tmp_path)
    take(data, 7, accumulate=2)
    assert data.state_dict()["stream"]["step"] == 3
    other = stream(source, tmp_path)
    other.load_state_dict(data.state_dict())
    assert torch.equal(
        take(other, 1, accumulate=2, first_step=3)[0], take(stream(source, tmp_path), 7, accumulate=2)[6]
    )


def test_a_step_that_was_handed_out_and_not_taken_is_not_lost(source: Path, tmp_path: Path) -> None:
    """Who saves between the two says which step is done, as the Trainer does."""
    data = stream(source, tmp_path)
    whole = take(data, 5)
    assert data.state_dict()["stream"]["step"] == 5
    other = stream(source, tmp_path)
    other._stream.load(data._stream.gather(4))
    assert torch.equal(take(other, 1, first_step=4)[0], whole[4])


def test_accumulation_may_change_without_workers(source: Path, tmp_path: Path) -> None:
    whole = take(stream(source, tmp_path), 6)
    first = stream(source, tmp_path)
    take(first, 3)
    second = stream(source, tmp_path)
    second.load_state_dict(first.state_dict())
    rest = take(second, 6, accumulate=2, first_step=3)
    assert torch.equal(torch.cat(rest), torch.cat(whole[3:]))


def test_training_and_validation_do_not_meet(source: Path, tmp_path: Path) -> None:
    data = stream(source, tmp_path)
    held_out = bytes(data._opened().val[:]).split(b"\0")[:-1]
    read = bytes(torch.cat(take(data, 400, steps=400)).flatten().tolist()).split(b"\0")[1:-1]
    assert len(set(read)) > 250
    assert not set(read) & set(held_out)
    assert sum(len(batch) for batch in data.val_loader(rows=8)) == 8


@pytest.mark.slow
def test_what_a_checkpoint_does_not_fit_is_refused(source: Path, tmp_path: Path) -> None:
    first = stream(source, tmp_path, num_workers=2)
    take(first, 3)
    state = first.state_dict()

    def resume(options: dict[str, Any], **loader: Any) -> None:
        data = stream(source, tmp_path, **{"num_workers": 2, **options})
        data.load_state_dict(state)
        take(data, 1, **loader)

    with pytest.raises(RecipeError, match=r"positions of 1 processes, this run has 2. Go on with 1.*prepare_data.py"):
        resume({}, first_step=3, world_size=2)
    with pytest.raises(RecipeError, match=r"positions of 1 micro-batches in a step, this run has 2"):
        resume({}, first_step=3, accumulate=2)
    with pytest.raises(RecipeError, match=r"cannot begin at step 5: the checkpoint holds its position behind step 3"):
        resume({}, first_step=5)
    with pytest.raises(RecipeError, match=r"data.num_workers is 1, the checkpoint was trained with 2"):
        resume({"num_workers": 0})
    with pytest.raises(RecipeError, match=r"another text or tokenizer than data.source hf:parquet"):
        resume({"tokenizer": "bpe-300", "vocab_size": 300})
    with pytest.raises(RecipeError, match=r"data.mode is shards, the checkpoint was trained with stream"):
        resume({"mode": "shards"})
    with pytest.raises(RecipeError, match=r"cannot begin at step 4: .* behind step 0"):
        take(stream(source, tmp_path), 1, first_step=4)


def test_too_few_parts_for_the_readers_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"has 8 parts, fewer than 3 \(processes\) x 3 .*data.mode shards"):
        take(stream(source, tmp_path, num_workers=3, batch_size=9), 1, world_size=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_document_that_cannot_be_read_is_the_error(tmp_path: Path, workers: int) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} memory"}) + "\n" for i in range(200)))
    data = TextData(
        str(tmp_path / "text.jsonl"),
        mode="stream",
        cache_dir=str(tmp_path),
        num_workers=workers,
        val_rows=1,
        final_val_rows=1,
    )
    data.prepare()
    data.open()
    (tmp_path / "text.jsonl").unlink()
    with pytest.raises(RecipeError, match=r"^cannot read .*text.jsonl: No such file"):
        take(data, 1)
