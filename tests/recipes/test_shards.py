"""Tests of writing documents as token shards, with every failure."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from am_lightning.pretrain.data import shards
from am_lightning.pretrain.data.prepare import Job, check_shards, is_complete, work_units, write_part, write_shards
from am_lightning.pretrain.data.processes import run_all
from am_lightning.pretrain.data.shards import SIDES, Shard, ShardedTokens, read_index
from am_lightning.pretrain.data.sources import find_source
from am_lightning.pretrain.data.tokenizer import ByteTokenizer
from am_lightning.pretrain.runtime.errors import RecipeError
from tests.processes import wait_for_end, wait_until
from tests.python import COLD, PYTHON

from .writer import PARTS, make_source

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return JSON lines of 4.2 MB: five parts of at most 1 MB."""
    return make_source(tmp_path_factory.mktemp("source") / "text.jsonl")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write(source, folder)
    return folder


def write(source: Path, folder: Path, workers: int = 1) -> None:
    write_shards(Job(folder, find_source(str(source)), ByteTokenizer(), 5.0, 1 << 20), workers)


def content(folder: Path) -> dict[str, bytes]:
    """Return everything that was made, without leftovers."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    }


def test_the_shards_hold_the_documents_in_order(source: Path, whole: Path) -> None:
    index = read_index(whole)
    documents = [d for chunk in find_source(str(source)).chunks(1 << 20) for d in chunk.documents()]
    for side, held_out in ((index.train, False), (index.val, True)):
        expected = [d.text for d in documents if d.is_validation(5.0) == held_out]
        assert bytes(ShardedTokens(whole, side, index.dtype)[:]).split(b"\0") == [*expected, b""]
        assert len(expected) == index.documents[SIDES[held_out]]
    assert len(index.train) == PARTS
    sizes = [(whole / shard.file).stat().st_size for shard in index.shards]
    assert sum(sizes) == index.bytes
    assert max(sizes) <= 1 << 20


def test_a_part_with_too_many_tokens_makes_several_files(source: Path, tmp_path: Path, whole: Path) -> None:
    """A text can have more tokens than bytes; no file grows beyond the limit and one document."""
    job = Job(tmp_path, find_source(str(source)), ByteTokenizer(), 5.0, 1 << 18)
    record = write_part(job, (0, work_units(job.source, 1 << 20)[0]))
    assert len(record.train) == 4
    assert all(shard.tokens < (1 << 18) + 5000 for shard in record.train)
    tokens = ShardedTokens(tmp_path, record.train, "uint8")
    assert bytes(tokens[:]) == (whole / "train-00000-00.bin").read_bytes()


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(source: Path, whole: Path, tmp_path: Path) -> None:
    write(source, tmp_path, workers=3)
    assert content(tmp_path) == content(whole)


def test_what_is_there_is_not_made_again(source: Path, whole: Path) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}

    before = times()
    write(source, whole)
    assert times() == before


def start_writer(source: Path, folder: Path, workers: int, *kill: str) -> subprocess.Popen[bytes]:
    args = [PYTHON, "-m", "tests.recipes.writer", str(source), str(folder), str(workers), *kill]
    return subprocess.Popen(args, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "part", "finished"),
    [
        ("fsync", "train-00002", 2),  # half of a shard is there
        ("replace", "val-00002", 2),  # one side of a part is there
        ("replace", "parts/.00002", 2),  # both are there without an index
        ("replace", "index.json", 5),  # all are there
    ],
)
def test_a_killed_writer_resumes_where_it_was(
    source: Path, whole: Path, tmp_path: Path, call: str, part: str, finished: int
) -> None:
    process = start_writer(source, tmp_path, 1, call, part)
    assert process.wait(120) == -signal.SIGKILL
    assert not is_complete(tmp_path)
    assert len(list((tmp_path / "parts").glob("[0-9]*.json"))) == finished
    kept = {path: path.stat().st_mtime_ns for n in range(finished) for path in tmp_path.glob(f"train-{n:05d}*.bin")}
    write(source, tmp_path)
    assert content(tmp_path) == content(whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.slow
def test_a_killed_worker_is_an_error_and_costs_one_part(source: Path, whole: Path, tmp_path: Path) -> None:
    process = start_writer(source, tmp_path, 2, "fsync", "train-00003")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    assert b"tokenizing: one of 2 processes was killed (out of memory?). The same command resumes" in errors
    assert not is_complete(tmp_path)
    write(source, tmp_path)
    assert content(tmp_path) == content(whole)


@pytest.mark.nightly("workers without parents")
@pytest.mark.slow
@pytest.mark.parametrize("ctrl_c", [False, True])
def test_no_worker_survives_its_parent(tmp_path: Path, ctrl_c: bool) -> None:
    """The parent is killed, or ends by a terminal's Ctrl-C, which reaches the workers, too: they must not continue."""
    code = (
        "import os; from am_lightning.pretrain.data.processes import run_all; from tests.recipes.writer import sleep;"
        "run_all(sleep, range(6), 2, 'sleeping')"
    )
    env = {**os.environ, "SLEEPERS": str(tmp_path)}
    process = subprocess.Popen([COLD, "-c", code], cwd=ROOT, env=env, start_new_session=True)
    try:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2, "not two workers")
        if ctrl_c:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(120)
    finally:
        process.kill()
        process.wait()
    workers = [int(path.name) for path in tmp_path.iterdir()]
    wait_for_end(workers, 120)


@pytest.mark.slow
def test_writers_at_the_same_time_end_well(source: Path, whole: Path, tmp_path: Path) -> None:
    writers = [start_writer(source, tmp_path, 1) for _ in range(3)]
    assert [writer.wait(240) for writer in writers] == [0] * 3
    assert content(tmp_path) == content(whole)


def test_an_error_in_one_part_is_the_error(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "text.jsonl"
    broken.write_bytes(source.read_bytes()[:3_000_000] + b"\n{\n")
    with pytest.raises(RecipeError, match=r"text.jsonl: the line at byte 3\d+ is not JSON|is not JSON"):
        write(broken, tmp_path / "out")
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 2
    assert not is_complete(tmp_path / "out")


@pytest.mark.parametrize(("percent", "side"), [(0.0001, "validation"), (99.9999, "training")])
def test_an_empty_split_is_refused(tmp_path: Path, percent: float, side: str) -> None:
    (tmp_path / "one.txt").write_text("text")
    with pytest.raises(RecipeError, match=rf"no document falls into the {side} split.*val_percent"):
        write_shards(Job(tmp_path / "out", find_source(str(tmp_path)), ByteTokenizer(), percent))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    for name, data in content(whole).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("train-00003-00.bin", lambda p: os.truncate(p, p.stat().st_size - 1), "bytes, its index gives"),
        ("train-00003-00.bin", flip, "checksum"),
        ("val-00001-00.bin", flip, "checksum"),
        ("val-00001-00.bin", lambda p: p.unlink(), "is missing"),
        ("index.json", lambda p: os.truncate(p, 0), "is broken"),
        ("index.json", lambda p: os.truncate(p, 200), "is broken"),
        ("index.json", lambda p: edit(p, version=99), "version 99, this program reads version 2"),
        ("index.json", lambda p: edit(p, dtype="float32"), "are impossible"),
        ("index.json", lambda p: edit(p, surprise=1), "surprise"),
        (
            "index.json",
            lambda p: p.write_text(p.read_text().replace('"train-', '"../train-')),
            "not a file in its folder",
        ),
        ("index.json", lambda p: p.write_text(p.read_text().replace('"val-', '"/val-')), "not a file in its folder"),
        ("index.json", lambda p: p.write_text("[]"), "is broken"),
    ],
)
def test_a_broken_file_is_named_with_the_cure(copied: Path, name: str, damage: object, says: str) -> None:
    damage(copied / name)  # type: ignore[operator]
    with pytest.raises(RecipeError, match=says) as caught:
        index = read_index(copied)
        check_shards(copied, index.shards, index.dtype, read_all=True)
    assert str(copied / name) in str(caught.value)
    assert f"Delete {name}; the next start rebuilds it" in str(caught.value)


@pytest.mark.parametrize("name", ["train-00003-00.bin", "index.json"])
def test_the_cure_cures(source: Path, whole: Path, copied: Path, name: str) -> None:
    """Only what was deleted is rebuilt."""
    before = {path: path.stat().st_mtime_ns for path in copied.glob("train-*.bin")}
    (copied / name).unlink()
    write(source, copied)
    assert content(copied) == content(whole)
    made = [path.name for path, when in before.items() if path.stat().st_mtime_ns != when]
    assert made == ([name] if name.endswith(".bin") else [])


def test_a_finished_part_that_was_damaged_is_made_again(source: Path, whole: Path, copied: Path) -> None:
    (copied / "index.json").unlink()
    flip(copied / "train-00001-00.bin")
    (other,) = (copied / "parts").glob("00002-*.json")
    other = other.rename(other.with_name("00002-of-other-documents.json"))
    next((copied / "parts").glob("00003-*.json")).write_text("{")
    (outside,) = (copied / "parts").glob("00000-*.json")
    outside.write_text(outside.read_text().replace('"train-', f'"../{copied.name}/train-'))
    write(source, copied)
    other.unlink()
    assert content(copied) == content(whole)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there are no token shards in .*gone"):
        read_index(tmp_path / "gone")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder on a file system of 3 MB. Without the right to mount, limit the size of a file instead."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
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


def test_a_full_disk_names_the_file_and_keeps_what_is_done(source: Path, whole: Path, small_disk: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot write .*/small/train-\d+-00.bin: .*MB free.*data.cache_dir"):
        write(source, small_disk)
    made = content(small_disk)
    assert made.items() <= content(whole).items()
    if len(made) > 1:  # there is enough space now
        subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
        write(source, small_disk)
        assert content(small_disk) == content(whole)


def test_the_files_are_mapped_when_needed_and_not_kept_open(whole: Path) -> None:
    index = read_index(whole)
    tokens = ShardedTokens(whole, index.train, index.dtype)
    open_files = len(os.listdir("/proc/self/fd"))
    assert len(tokens[:]) == len(tokens)
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert len(pickle.dumps(tokens)) < 2000  # another process gets the names, not the tokens


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    start=st.integers(0, 60),
    size=st.integers(0, 30),
    dtype=st.sampled_from(["uint8", "uint16", "uint32"]),
)
def test_a_slice_goes_over_any_number_of_files(
    lengths: list[int], start: int, size: int, dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("slices")
    expected = np.arange(sum(lengths)).astype(dtype)
    parts = np.split(expected, np.cumsum(lengths)[:-1])
    for number, part in enumerate(parts):
        part.tofile(folder / str(number))
    tokens = ShardedTokens(folder, [Shard(str(i), n, "") for i, n in enumerate(lengths)], dtype)
    found = tokens[start : start + size]
    assert found.dtype == dtype
    assert found.tolist() == expected[start : start + size].tolist()


def test_the_checksum_of_all_follows_every_token(whole: Path, copied: Path) -> None:
    index = read_index(whole)
    assert read_index(copied).sha256 == index.sha256
    fields = json.loads((copied / "index.json").read_text())
    fields["train"][2]["sha256"] = "0" * 64
    edit(copied / "index.json", **fields)
    assert read_index(copied).sha256 != index.sha256


def test_tasks_come_back_in_order_in_this_process() -> None:
    assert run_all(str, [3, 1, 2], 1, "x") == ["3", "1", "2"]
    assert shards.FORMAT_VERSION == 2
