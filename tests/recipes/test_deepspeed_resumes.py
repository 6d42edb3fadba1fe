"""A resume under Lightning's DeepSpeed has the numbers of its command, as under DDP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from .commands import TINY
from .entry_points import ZERO, EntryPoint, launch

pytestmark = [
    pytest.mark.nightly("DeepSpeed resumes"),
    pytest.mark.skipif(not shutil.which("g++"), reason="DeepSpeed compiles a CPU operator; there is no g++"),
]

KEYS = ("lr", "weight_decay", "betas", "eps")


class Groups(L.Callback):
    """Writes the options with which DeepSpeed's engine makes each step: those of its groups and of its optimizer's."""

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        engine: Any = trainer.strategy.deepspeed_engine  # type: ignore[attr-defined]
        groups = [*engine.optimizer.param_groups, *engine.optimizer.optimizer.param_groups]
        if trainer.is_global_zero:
            line = [trainer.global_step, [[group[key] for key in KEYS] for group in groups]]
            with Path(trainer.default_root_dir, "groups.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.sample), 3])
def test_the_command_wins(tmp_path: Path, corpus_folder: Path, stage: int) -> None:
    given = {
        **{
            key: value
            for key, value in TINY.items()
            if key not in ("trainer.accelerator", "trainer.enable_progress_bar")
        },
        "data.source": corpus_folder,
        "data.batch_size": 8,
        "checkpoint.every_n_train_steps": 2,
        "model.schedule": "constant",
        "trainer.callbacks+": "tests.recipes.test_deepspeed_resumes.Groups",
        "trainer.devices": 2,
        "trainer.strategy": "tests.deepspeed.entry_points.OnCPU",
        "trainer.strategy.config": ZERO / f"zero{stage}.json",
    }
    changed = {
        "model.optimizer.lr": 1e-4,
        "model.weight_decay": 0.03,
        "model.optimizer.betas": [0.7, 0.9],
        "model.optimizer.eps": 1e-6,
    }
    entry = EntryPoint("pretrain.py")
    for steps, more in ((2, {}), (4, {"ckpt_path": "last", **changed})):
        words = [word for key, value in (given | more).items() for word in (f"--{key}", str(value))]
        done = launch(entry, "laptop", tmp_path, [*words, "--trainer.max_steps", str(steps)])
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    *before, third, fourth = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert before[0][1] == 2 * [[2e-3, 0.1, [0.8, 0.95], 1e-8], [2e-3, 0.0, [0.8, 0.95], 1e-8]]
    assert third[1] == fourth[1] == 2 * [[1e-4, 0.03, [0.7, 0.9], 1e-6], [1e-4, 0.0, [0.7, 0.9], 1e-6]]
