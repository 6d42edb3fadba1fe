"""A callback for pretrain.py's command line that records which rows each process gets."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback


class RowLog(Callback):
    """Write per micro-batch a line {"step", "rows"} to `folder`/rank-R.jsonl: steps before it, hashes of its rows."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: torch.Tensor, batch_idx: int
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [hashlib.sha256(bytes(row)).hexdigest()[:16] for row in batch.cpu().numpy().astype("int64")]
        with open(self.folder / f"rank-{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps({"step": trainer.global_step, "rows": rows}) + "\n")


def read_rows(folder: Path) -> dict[int, list[Any]]:
    """Return step -> the rows of its micro-batches, each a list over the ranks in order."""
    steps: dict[int, list[list[str]]] = {}
    ranks = [path.read_text().splitlines() for path in sorted(folder.glob("rank-*.jsonl"))]
    for lines in zip(*ranks, strict=True):
        records = [json.loads(line) for line in lines]
        assert len({record["step"] for record in records}) == 1
        steps.setdefault(records[0]["step"], []).append([row for record in records for row in record["rows"]])
    return steps
