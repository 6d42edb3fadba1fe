"""data.mode litdata: every row once per pass, exact resumes for any number of processes, damage that is named."""

from __future__ import annotations

import functools
import hashlib
import http.server
import itertools
import json
import os
import random
import shutil
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import prepare_data
import pytest
import torch

from am_lightning.pretrain.data.text_data import TextData
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.recipes.__main__ import main
from tests.ports import free_port
from tests.python import PYTHON

from .commands import RECIPES
from .row_log import read_rows

pytest.importorskip("litdata", reason="litdata is not installed")

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN, BATCH = 16, 8
Rows = list[bytes]

pytestmark = pytest.mark.filterwarnings("ignore:.*suggested max number of worker.*")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return texts of which no two rows are the same."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(2):
        texts = (f"{number} {i} " + random.Random(i + 1000 * number).randbytes(130).hex() for i in range(60))
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of chunks of `source`, smaller than `shard_mb` permits."""
    from am_lightning.pretrain.data.litdata_folder import write_chunks

    data = TextData(str(source), cache_dir=str(tmp_path_factory.mktemp("shards")), seq_len=SEQ_LEN, shard_mb=1)
    data.prepare()
    folder = tmp_path_factory.mktemp("chunks") / "made"
    write_chunks(data.storage.folder(), folder, seq_len=SEQ_LEN, chunk_bytes=2600)
    assert len(list(folder.glob("chunk-*.bin"))) > 9
    return folder


def opened(made: Path | str, **options: Any) -> TextData:
    defaults = {"mode": "litdata", "seq_len": SEQ_LEN, "batch_size": BATCH, "val_rows": 4, "final_val_rows": 8}
    data = TextData(str(made), **{**defaults, "cache_dir": str(Path(str(made)).parent / "cache"), **options})
    data.prepare()
    data.open()
    return data


def steps_of(data: TextData, first: int, stop: int, world_size: int = 1, accumulate: int = 1) -> tuple[list[Rows], Any]:
    """Return the rows of the steps [first, stop) over all ranks, in order, and the state after them."""
    state, micro = json.loads(json.dumps(data.state_dict())), []
    for rank in range(world_size):
        data.load_state_dict(state)
        options = {"steps": 10_000, "rank": rank, "world_size": world_size, "accumulate": accumulate}
        loader = data.train_loader(**options, first_step=first)
        assert len(loader) == 10_000 * accumulate
        micro.append([batch.clone() for batch in itertools.islice(loader, (stop - first) * accumulate)])
    batches = [torch.cat([rank[number] for rank in micro]) for number in range(len(micro[0]))]
    assert all(batch.shape == (BATCH // accumulate, SEQ_LEN) and batch.dtype == torch.int64 for batch in batches)
    rows = [bytes(row.numpy().astype(np.uint8)) for batch in batches for row in batch]
    return [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)], json.loads(json.dumps(data.state_dict()))


def all_rows(made: Path) -> set[bytes]:
    files = (path.read_bytes()[12:] for path in made.glob("chunk-*.bin"))
    return {text[i : i + SEQ_LEN] for text in files for i in range(0, len(text) - SEQ_LEN + 1, SEQ_LEN)}


@pytest.mark.parametrize(("world_size", "workers", "accumulate"), [(1, 0, 1), (2, 2, 2), (4, 1, 1)])
def test_a_pass_has_every_row_once(made: Path, world_size: int, workers: int, accumulate: int) -> None:
    expected = all_rows(made)
    per_pass = len(expected) // BATCH
    steps, _ = steps_of(opened(made, num_workers=workers), 0, 2 * per_pass, world_size, accumulate)
    first, second = (list(itertools.chain(*part)) for part in (steps[:per_pass], steps[per_pass:]))
    for rows in (first, second):
        assert len(rows) == len(set(rows)) == per_pass * BATCH
        assert set(rows) <= expected
    assert first != second


def test_a_resume_is_exact_for_any_processes_workers_and_micro_batches(made: Path) -> None:
    """The run resumes repeatedly, late in a pass (where litdata refuses more processes) and across its end."""
    per_pass = len(all_rows(made)) // BATCH
    data = opened(made, num_workers=2)
    whole, _ = steps_of(data, 0, per_pass, world_size=2)
    at, state = 0, None
    for until, world_size, workers, accumulate in [
        (7, 2, 2, 1),
        (per_pass // 2 + 1, 2, 2, 1),
        (per_pass // 2 + 6, 1, 0, 2),
        (per_pass // 2 + 9, 1, 0, 2),
        (per_pass - 3, 4, 0, 1),
        (per_pass, 1, 3, 4),
    ]:
        resumed = opened(made, num_workers=workers)
        if state:
            resumed.load_state_dict(state)
        steps, state = steps_of(resumed, at, until, world_size, accumulate)
        assert [sorted(step) for step in steps] == [sorted(step) for step in whole[at:until]]
        at = until
    begun = opened(made, num_workers=2)
    begun.load_state_dict(state)
    second, state = steps_of(begun, per_pass, per_pass + 9, world_size=2)
    resumed = opened(made)
    resumed.load_state_dict(state)
    assert list(map(sorted, steps_of(resumed, per_pass + 4, per_pass + 9)[0])) == list(map(sorted, second[4:]))


def test_memory_of_a_resume_on_other_processes_is_announced(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from am_lightning.pretrain.data import litdata_loader

    _, state = steps_of(opened(made), 0, 3, world_size=2)
    for world_size, limit in ((1, 10**9), (2, 0), (1, 0)):
        monkeypatch.setattr(litdata_loader, "MANY_ROWS", limit)
        resumed = opened(made)
        resumed.load_state_dict(state)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps_of(resumed, 3, 5, world_size)
        told = [str(each.message) for each in caught if "keeps a list" in str(each.message)]
        assert len(told) == ((world_size, limit) == (1, 0))
    assert f"its {len(all_rows(made)):,} rows" in told[0] and "begun by 2 x 1 loader processes" in told[0]


def test_a_parallel_file_system_has_the_same_order(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On such a file system litdata assigns whole chunks to a process, depending on the number of processes."""
    expected, _ = steps_of(opened(made), 0, 20)
    monkeypatch.setenv("LITDATA_POSIX_FAST", "1")
    assert steps_of(opened(made), 0, 20)[0] == expected


def test_validation_rows_are_held_out(made: Path) -> None:
    data = opened(made)
    rows = torch.cat(list(data.val_loader(rows=8)))
    assert rows.shape == (8, SEQ_LEN)
    assert not {bytes(row.numpy().astype(np.uint8)) for row in rows} & all_rows(made)


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copied")


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_named_before_a_row_of_it_is_given(copied: Path, workers: int) -> None:
    data = opened(copied, num_workers=workers)
    path = copied / "chunk-0-3.bin"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    given: list[torch.Tensor] = []
    with pytest.raises(RecipeError, match=r"^the chunk chunk-0-3.bin of data.source .*copied is broken: its content"):
        given.extend(data.train_loader(steps=10_000))
    rows = {bytes(row.numpy().astype(np.uint8)) for batch in given for row in batch}
    assert not rows & {bytes(content[i : i + SEQ_LEN]) for i in range(12, len(content), SEQ_LEN)}
    with pytest.raises(RecipeError, match=r"chunk-0-3.bin is broken: its content does not have the checksum"):
        opened(copied)


def test_a_chunk_that_is_gone_is_named(copied: Path) -> None:
    data = opened(copied)
    (copied / "chunk-0-2.bin").unlink()
    with pytest.raises(RecipeError, match=r"cannot read the chunk chunk-0-2.bin of data.source .*copied"):
        list(data.train_loader(steps=10_000))
    with pytest.raises(RecipeError, match=r"chunk-0-2.bin is broken: it is missing"):
        opened(copied)


@pytest.mark.parametrize("name", ["../../outside.bin", "/tmp/outside.bin", "chunk-9-9.bin"])
def test_an_index_that_names_other_files_is_refused(copied: Path, name: str) -> None:
    """litdata would read these files, and download them from an object store to the named paths."""
    path = copied / "index.json"
    index = json.loads(path.read_text())
    index["chunks"][2]["filename"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(
        RecipeError, match=r"index.json and chunks.json do not name the same chunks: only one of them names '.*'"
    ):
        opened(copied)
    chunks = json.loads((copied / "chunks.json").read_text())
    chunks["train"][2]["file"] = name
    (copied / "chunks.json").write_text(json.dumps(chunks))
    wanted = rf"'{name}', which is not a file in its folder|{name} is broken: it is missing"
    with pytest.raises(RecipeError, match=wanted):
        opened(copied)


def test_what_does_not_fit_is_refused(made: Path, source: Path, tmp_path: Path) -> None:
    state = steps_of(opened(made), 0, 3)[1]
    for options, message in [
        ({"batch_size": 16}, r"data.batch_size is 16, the checkpoint was trained with 8. Set it back"),
        ({"seed": 1}, r"data.seed is 1, the checkpoint was trained with 0"),
    ]:
        with pytest.raises(RecipeError, match=message):
            opened(made, **options).load_state_dict(state)
    with pytest.raises(RecipeError, match=r"data.mode is shards, the checkpoint was trained with litdata"):
        shards = TextData(str(source), seq_len=SEQ_LEN, cache_dir=str(tmp_path))
        shards.prepare()
        shards.open()
        shards.load_state_dict(state)
    with pytest.raises(RecipeError, match=r"not divisible by 3 \(processes with different rows\)"):
        opened(made).train_loader(steps=1, world_size=3)
    with pytest.raises(RecipeError, match=r"cannot begin in the middle of a pass without the data's state"):
        next(iter(opened(made).train_loader(steps=9, first_step=3)))
    with pytest.raises(RecipeError, match=r"shorter than one step of data.batch_size 1000000 rows"):
        opened(made, batch_size=1_000_000).train_loader(steps=1)
    with pytest.raises(RecipeError, match=r"data.mode is 'stream'; allowed: \"shards\" or \"litdata\""):
        TextData(mode="stream")
    with pytest.raises(RecipeError, match=r"made is a folder of litdata chunks: set data.mode litdata"):
        TextData(str(made)).prepare()
    with pytest.raises(RecipeError, match=r"hf://some/data.*of hf:// litdata reads parquet alone"):
        opened("hf://some/data", cache_dir=str(tmp_path))


def test_validate_does_not_look_for_a_url_on_this_disk(tmp_path: Path) -> None:
    data = ["--data.mode", "litdata", "--data.source", "s3://bucket/chunks"]
    data += ["--trainer.default_root_dir", str(tmp_path / "run")]
    assert main(["validate", "laptop", *data]) == 0
    with pytest.raises(
        SystemExit, match=r"data.source \(data.mode litdata\) is 'http://x/y'; allowed: documents as in"
    ):
        main(["validate", "laptop", *data, "--data.source", "http://x/y"])


def test_prepare_data_makes_the_folder_from_documents(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--config=laptop", f"--root={tmp_path}", f"--data.source={source}", "--data.mode=litdata", "--workers=1"]
    prepare_data.main([*args, "--check"])
    assert "-litdata: made, all checksums are right" in capsys.readouterr().out
    (folder,) = (tmp_path / "data").glob("*-litdata")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    prepare_data.main(args)
    assert "complete, nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (folder / "chunk-0-0.bin").unlink()
    prepare_data.main(args)
    assert ": made" in capsys.readouterr().out
    assert (folder / "chunk-0-0.bin").exists()


class _Store(http.server.SimpleHTTPRequestHandler):
    """The part of S3 that is read: GET and HEAD of /BUCKET/KEY."""

    index_delay_s = 0.0

    def do_GET(self) -> None:
        if self.path.startswith("/bucket/copied/index.json"):
            time.sleep(self.index_delay_s)
        super().do_GET()

    def end_headers(self) -> None:
        self.send_header("ETag", '"0"')
        super().end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def store(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return a server that serves the chunks in `copied` as s3://bucket/copied."""
    root = copied.parent / "store"
    (root / "bucket").mkdir(parents=True)
    copied.rename(root / "bucket" / "copied")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Store, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield "s3://bucket/copied"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_an_object_store_gives_the_rows_of_a_folder(made: Path, store: str, tmp_path: Path) -> None:
    expected, state = steps_of(opened(made), 0, 12)
    cache = {"cache_dir": str(tmp_path / "cache")}
    assert steps_of(opened(store, **cache, num_workers=1), 0, 12)[0] == expected
    resumed = opened(store, **cache)
    resumed.load_state_dict(state)
    assert steps_of(resumed, 7, 12)[0] == expected[7:]


@pytest.mark.nightly("damaged stores")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damage_in_an_object_store_ends_with_its_name(
    store: str, tmp_path: Path, damage: str, workers: int, copied: Path
) -> None:
    """Damage is found when a chunk is read, and no process waits for a missing chunk."""
    path = copied.parent / "store" / "bucket" / "copied" / "chunk-0-3.bin"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped" else content[:1300])
    data = opened(store, cache_dir=str(tmp_path / "cache"), num_workers=workers)
    with pytest.raises(RecipeError, match=r"chunk-0-3.bin|cannot read the chunk"):
        list(data.train_loader(steps=10_000))


def test_a_store_that_is_gone_when_a_pass_begins_is_named(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = opened(store, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(RecipeError, match=r"data.source s3://bucket/copied: litdata cannot open it \(.*Error: "):
        next(iter(data.train_loader(steps=1)))


UNREACHABLE = """
import sys
from am_lightning.pretrain.data.text_data import TextData
from am_lightning.pretrain.runtime.errors import RecipeError

try:
    TextData("s3://bucket/chunks", mode="litdata", cache_dir=sys.argv[1]).prepare()
except RecipeError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_store_that_cannot_be_reached_is_an_error(tmp_path: Path) -> None:
    """litdata would try 1000 times, for hours, before a run or in a loader process."""
    env = {**os.environ, "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_MAX_ATTEMPTS": "2"}
    env |= {"AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}
    command = [PYTHON, "-c", UNREACHABLE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    says = "data.source s3://bucket/chunks: cannot read index.json (EndpointConnectionError:"
    assert says in done.stdout, done.stderr


READER = """
import itertools, sys
from am_lightning.pretrain.data.text_data import TextData
options = {"seq_len": 16, "batch_size": 8, "val_rows": 4, "final_val_rows": 8}
data = TextData(sys.argv[1], mode="litdata", cache_dir=sys.argv[2], **options)
data.open()
loader = data.train_loader(steps=10_000, rank=int(sys.argv[3]), world_size=2)
assert len(list(itertools.islice(loader, 3))) == 3
"""


@pytest.mark.slow
def test_processes_of_one_machine_open_a_slow_store_together(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """litdata waits 1 s for an index that another process downloads, and then fails as if it did not exist."""
    cache = str(tmp_path / "cache")
    opened(store, cache_dir=cache)
    monkeypatch.setattr(_Store, "index_delay_s", 4.0)
    readers = [
        subprocess.Popen([PYTHON, "-c", READER, store, cache, str(rank)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [reader.communicate(timeout=300)[1] for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0], said


SMALL = {
    "model.seq_len": SEQ_LEN,
    "model.hidden_size": 8,
    "model.intermediate_size": 8,
    "model.num_layers": 1,
    "trainer.accelerator": "cpu",
    "trainer.val_check_interval": 2,
    "data.mode": "litdata",
    "data.val_rows": 4,
    "data.final_val_rows": 4,
    "ckpt_path": "last",
}


def train(program: str, root: Path, made: Path, steps: int, processes: int, dies: int = -1) -> dict[int, list[str]]:
    """Continue to `steps` on `processes` processes; return the hashes of the rows of each step, over all ranks."""
    rows = root.parent / f"rows-{processes}"
    settings = {**SMALL, "data.source": made, "trainer.max_steps": steps, "trainer.default_root_dir": root}
    if program == "pretrain.py":
        settings |= {"trainer.devices": processes, "trainer.strategy": "ddp"}
    command = [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", str(free_port()), "-m", "tests.recipes.recorded", str(rows), str(dies), program, "fit"]
    command += ["--config", str(RECIPES / "configs" / "laptop.yaml")]
    command += [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    launched = ("LOCAL_RANK", "RANK", "WORLD_SIZE")
    variables = {key: value for key, value in os.environ.items() if key not in launched}
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert (result.returncode == 0) == (dies < 0), result.stdout + result.stderr
    return {step: list(itertools.chain(*micro)) for step, micro in read_rows(rows).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "pretrain.py",
        pytest.param("pretrain_accelerate.py", marks=pytest.mark.nightly("litdata programs")),
        pytest.param("pretrain_hf_trainer.py", marks=pytest.mark.nightly("litdata programs")),
    ],
)
def test_a_killed_run_gets_the_same_rows_on_fewer_and_on_more_processes(
    program: str, made: Path, tmp_path: Path
) -> None:
    whole, _ = steps_of(opened(made), 0, 9, world_size=2)
    tokens = [[np.frombuffer(row, np.uint8).astype(np.int64) for row in step] for step in whole]
    hashes = [sorted(hashlib.sha256(row).hexdigest()[:16] for row in step) for step in tokens]
    train(program, tmp_path / "run", made, 9, 2, dies=5)
    first = train(program, tmp_path / "run", made, 6, 1)
    second = train(program, tmp_path / "run", made, 9, 4)
    begun = min(first)
    assert begun in (4, 5)  # a program may request a step's rows before or after it has saved the previous step
    assert {step: sorted(rows) for step, rows in {**first, **second}.items()} == dict(enumerate(hashes[begun:], begun))
