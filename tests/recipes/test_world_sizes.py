"""Runs of pretrain.py that change their number of processes when they are resumed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from am_lightning.pretrain.data.text_data import TextData

from .commands import arguments, run
from .row_log import read_rows

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN = 16  # SMALL is the smallest model of pretrain.py
SMALL = {
    "model.seq_len": SEQ_LEN,
    "model.hidden_size": 8,
    "model.intermediate_size": 8,
    "model.num_layers": 1,
    "trainer.strategy": "ddp",
    "trainer.val_check_interval": 1000,
    "data.val_rows": 4,
    "data.final_val_rows": 4,
    "ckpt_path": "last",
}


def resume(root: Path, source: Path, steps: int, devices: int, **changes: object) -> tuple[int, str]:
    """Train up to `steps` on `devices` processes; return the exit status and the errors."""
    extra = {**SMALL, **changes, "trainer.devices": devices}
    log = json.dumps({"class_path": "tests.recipes.row_log.RowLog", "init_args": {"folder": str(root / f"to-{steps}")}})
    args = arguments(root, source, steps, *(text for key, value in extra.items() for text in (f"--{key}", str(value))))
    result = run([*args, "--trainer.callbacks+", log], root.parent, PYTHONPATH=str(ROOT))
    return result.returncode, result.stderr


@pytest.mark.slow
def test_the_samples_of_every_step_stay_from_1_to_2_to_4_processes(tmp_path: Path, corpus_folder: Path) -> None:
    """The number of micro-batches changes, too. The expected rows are those of the order, read without a Trainer."""
    root = tmp_path / "run"
    seen: dict[int, list[str]] = {}
    for steps, devices, accumulate in ((2, 1, 1), (4, 2, 2), (6, 4, 1)):
        status, errors = resume(
            root,
            corpus_folder,
            steps,
            devices,
            **{"trainer.accumulate_grad_batches": accumulate, "data.num_workers": 1},
        )
        assert status == 0, errors
        rows = read_rows(root / f"to-{steps}")
        assert sorted(rows) == [steps - 2, steps - 1]
        assert [len(micro) for batches in rows.values() for micro in batches] == [8 // accumulate] * 2 * accumulate
        seen |= {step: [row for micro in batches for row in micro] for step, batches in rows.items()}
    data = TextData(str(corpus_folder), seq_len=SEQ_LEN, cache_dir=str(root / "data"))
    data.open()
    tokens = np.asarray(data._tokens(data._index.train)[:], np.int64)
    order = np.random.default_rng([0, 0]).permutation(len(tokens) // SEQ_LEN)[:48].reshape(6, 8)
    rows_of = tokens[: len(tokens) // SEQ_LEN * SEQ_LEN].reshape(-1, SEQ_LEN)
    assert seen == {step: hashes(rows_of[rows]) for step, rows in enumerate(order)}


def hashes(rows: np.ndarray) -> list[str]:
    return [hashlib.sha256(bytes(row)).hexdigest()[:16] for row in rows]
