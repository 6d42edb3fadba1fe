"""Tests of TextData with a plain Trainer."""

from __future__ import annotations

import json
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from am_lightning import AMAdamW
from am_lightning.pretrain.checkpoints import AtomicCheckpointIO, RunCheckpoint
from am_lightning.pretrain.data.text_data import TextData
from am_lightning.pretrain.model.lightning_module import LlamaPretraining
from am_lightning.pretrain.runtime.errors import RecipeError
from tests.python import PYTHON

from .commands import differences

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*have no logger configured.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
]


class Batches(L.Callback):
    """Keep the batches of each loop."""

    def __init__(self) -> None:
        self.train: list[torch.Tensor] = []
        self.validation: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: torch.Tensor, batch_idx: int) -> None:
        self.train.append(batch)

    def on_validation_batch_start(self, trainer: L.Trainer, module: Any, batch: torch.Tensor, *_: Any) -> None:
        self.validation.append(batch)


def fit(root: Path, source: Path, steps: int = 4, ckpt_path: str | None = None, **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    batches = Batches()
    data = TextData(str(source), seq_len=32, val_rows=6, final_val_rows=12, val_batch_size=4, **options)
    model = LlamaPretraining(32, 64, 2, 2, seq_len=32, optimizer=partial(AMAdamW, lr=1e-3))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        default_root_dir=root,
        callbacks=[batches, RunCheckpoint(str(root / "checkpoints"), every_n_train_steps=2)],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return trainer, model, data, batches


def test_batches_are_rows_of_the_text(tmp_path: Path, corpus_folder: Path) -> None:
    trainer, model, data, batches = fit(tmp_path, corpus_folder)
    assert [b.shape for b in batches.train] == [(8, 32)] * 4
    train = bytes(data._tokens(data._index.train)[:])
    rows = {train[i : i + 32] for i in range(0, len(train) - 31, 32)}
    assert {bytes(row) for row in torch.cat(batches.train).tolist()} <= rows
    assert [len(b) for b in batches.validation] == [4, 2] * 2
    held_out = bytes(data._tokens(data._index.val)[:])
    assert all(bytes(row) in held_out for row in torch.cat(batches.validation).tolist())
    batches.validation.clear()
    trainer.validate(model, datamodule=data, verbose=False)
    assert [len(b) for b in batches.validation] == [4, 4, 4]
    assert data.scored_rows == 12


def test_validation_rows_are_evenly_spaced(tmp_path: Path, corpus_folder: Path) -> None:
    data = TextData(str(corpus_folder), seq_len=32, cache_dir=str(tmp_path))
    data.prepare()
    data.open()
    text = bytes(data._tokens(data._index.val)[:])
    available = len(text) // 32
    for wanted in (6, available + 1):
        rows = min(wanted, available // 2 * 2)
        ranks = [torch.cat(list(data.val_loader(rank=rank, world_size=2, rows=wanted))) for rank in range(2)]
        first = [number * available // min(wanted, available) * 32 for number in range(rows)]
        assert [bytes(row) for row in torch.stack(ranks, 1).flatten(0, 1).tolist()] == [text[i : i + 32] for i in first]
        assert data.scored_rows == rows


def test_shards_are_made_once_and_again_for_another_text(tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.mkdir()
    for number in range(80):
        (source / f"{number}.txt").write_text("some text " * 40)
    fit(tmp_path, source, steps=1)
    (first,) = (tmp_path / "data").glob("*/train-*.bin")
    written = first.stat().st_mtime_ns
    fit(tmp_path, source, steps=1)
    assert [p.stat().st_mtime_ns for p in (tmp_path / "data").glob("*/train-*.bin")] == [written]
    (source / "more.txt").write_text("more")
    fit(tmp_path, source, steps=1)
    assert len(list((tmp_path / "data").iterdir())) == 2


def test_the_cache_may_be_elsewhere(tmp_path: Path, corpus_folder: Path) -> None:
    fit(tmp_path / "run", corpus_folder, steps=1, cache_dir=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert not (tmp_path / "run" / "data").exists()


def test_a_folder_of_shards_is_a_source(tmp_path: Path, corpus_folder: Path) -> None:
    """The tokens come from another machine with their identity, without the documents."""
    made = TextData(str(corpus_folder), cache_dir=str(tmp_path / "cache"))
    made.prepare()
    made.open()
    moved = (tmp_path / "cache").rename(tmp_path / "elsewhere") / made.storage.folder().name
    copied = TextData(str(moved), cache_dir=str(tmp_path / "unused"))
    copied.prepare()
    copied.open()
    assert copied.storage.folder() == moved
    assert copied.state_dict() == made.state_dict()
    assert not (tmp_path / "unused").exists()
    (moved / "val-00000-00.bin").unlink()
    with pytest.raises(RecipeError, match=r"val-00000-00.bin is broken: it is missing.*copy it again"):
        copied.prepare()


@pytest.mark.filterwarnings("ignore:.*suggested max number of worker.*")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_do_not_change_the_order_or_the_resume(tmp_path: Path, corpus_folder: Path, workers: int) -> None:
    """A worker reads ahead of the training; what it has read at a checkpoint must not be lost."""
    _, whole, _, batches = fit(tmp_path / "whole", corpus_folder, steps=6)
    _, _, _, same = fit(tmp_path / "same", corpus_folder, steps=6, num_workers=workers)
    assert differences([b.clone() for b in same.train], batches.train) == []
    middle = str(tmp_path / "same" / "checkpoints" / "step-000002.ckpt")
    _, resumed, _, rest = fit(tmp_path / "rest", corpus_folder, steps=6, ckpt_path=middle, num_workers=workers)
    assert differences([b.clone() for b in rest.train], batches.train[2:]) == []
    assert differences(dict(resumed.state_dict()), dict(whole.state_dict())) == []


STOPPED_WORKER = """
import multiprocessing, os, signal, sys
from am_lightning.pretrain.data.text_data import TextData
from am_lightning.pretrain.runtime.errors import RecipeError

more = dict(num_workers=2, loader_timeout_s=1.5, shard_mb=1, prepare_workers=1)
data = TextData(sys.argv[1], cache_dir=sys.argv[2], mode=sys.argv[3], **more)
data.prepare()
data.open()
batches = iter(data.train_loader(steps=1000))
next(batches)
os.kill(multiprocessing.active_children()[0].pid, signal.SIGSTOP)
try:
    for batch in batches:
        pass
except RecipeError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("mode", ["shards", "litdata"])
def test_a_stopped_loader_process_ends_the_run(tmp_path: Path, mode: str) -> None:
    """The run ends at the next batch, although it waits for its children and SIGTERM does not end a stopped one."""
    if mode == "litdata":
        pytest.importorskip("litdata", reason="litdata is not installed")
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(20_000))
    )
    command = [PYTHON, "-c", STOPPED_WORKER, str(tmp_path / "text.jsonl"), str(tmp_path / "cache"), mode]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1, ended.stderr
    assert "gave no batch for 1.5 s (data.loader_timeout_s)" in ended.stderr


@pytest.mark.filterwarnings("error:.*not resumable.*")
def test_lightning_knows_that_a_resume_is_exact(tmp_path: Path, corpus_folder: Path) -> None:
    fit(tmp_path / "whole", corpus_folder, steps=4)
    middle = str(tmp_path / "whole" / "checkpoints" / "step-000002.ckpt")
    fit(tmp_path / "rest", corpus_folder, steps=4, ckpt_path=middle)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("seq_len", 1),
        ("batch_size", 0),
        ("val_rows", 0),
        ("final_val_rows", -1),
        ("val_batch_size", 0),
        ("val_percent", 0.0),
        ("val_percent", 100.0),
        ("val_percent", float("nan")),
        ("num_workers", -1),
        ("loader_timeout_s", 0.0),
        ("prepare_workers", 0),
        ("shard_mb", 0),
        ("seed", -1),
    ],
)
def test_a_wrong_argument_is_named(argument: str, value: float) -> None:
    with pytest.raises(RecipeError, match=rf"data.{argument} is {value}; allowed: "):
        TextData(**{argument: value})  # type: ignore[arg-type]
