"""llama-8b.yaml started as by a user, with smaller sizes: 2 x 2 processes train as one does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.huggingface.events import scalars_in
from tests.python import PYTHON
from tests.recipes.commands import PRETRAIN, RECIPES

STEPS = 5
SMALL = {
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.num_heads": 4,
    "model.num_key_value_heads": 2,
    "model.num_layers": 2,
    "model.vocab_size": 256,
    "model.seq_len": 32,
    "model.optimizer.lr": 0.02,
    "data.source_options": "null",
    "data.tokenizer": "bytes",
    "data.mode": "shards",
    "data.num_workers": 0,
    "data.batch_size": 8,
    "data.val_percent": 5,
    "data.val_rows": 8,
    "data.final_val_rows": 16,
    "data.prepare_workers": 1,
    "trainer.max_steps": STEPS,
    "trainer.accelerator": "cpu",
    "trainer.num_nodes": 1,
    "trainer.precision": "32-true",
    "trainer.accumulate_grad_batches": 2,
    "trainer.val_check_interval": 10,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": "false",
    "monitor.peak_flops": 1e12,
    "checkpoint.every_n_train_steps": STEPS,
}
ALONE = {"trainer.devices": 1, "trainer.strategy": "auto"}
SPREAD = {"trainer.devices": 4, "trainer.strategy.data_parallel_size": 2}  # the YAML has tensor_parallel_size: 2


def train(root: Path, corpus: Path, processes: int, settings: dict[str, object]) -> dict[str, dict[int, float]]:
    """Return the curves of a run of pretrain.py under torchrun."""
    command = [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--standalone", str(PRETRAIN), "fit"]
    command += ["--config", str(RECIPES / "configs" / "llama-8b.yaml")]
    chosen = {**SMALL, "data.source": corpus, "trainer.default_root_dir": root, **settings}
    for key, value in chosen.items():
        command += [f"--{key}", str(value)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert "validation loss" in done.stdout
    return scalars_in(root / "logs")


@pytest.mark.slow
def test_the_8b_recipe_over_2_x_2_processes_trains_as_one(tmp_path: Path, corpus_folder: Path) -> None:
    alone = train(tmp_path / "alone", corpus_folder, 1, dict(ALONE))
    spread = train(tmp_path / "spread", corpus_folder, 4, dict(SPREAD))
    assert list(alone["train/loss"]) == list(spread["train/loss"]) and len(alone["train/loss"]) == STEPS
    for name in ("train/loss", "am/beta/mean", "am/grad_norm", "val/loss"):
        ours, theirs = list(spread[name].values()), list(alone[name].values())
        bound = 5e-4 if name == "am/grad_norm" else 1e-4  # steep like the loss: it shows the weights' last bits
        assert ours == pytest.approx(theirs, rel=bound), name
    losses = list(alone["train/loss"].values())
    assert losses[-1] < losses[0] - 0.3
    assert min(alone["am/beta/mean"].values()) < 0.88  # the momentum moves
