"""Callbacks read no value on the host and copy none from pageable memory in any step."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from am_lightning import AMAdamW
from am_lightning.pretrain.callbacks.fault_tolerance import FaultTolerance
from am_lightning.pretrain.runtime.collectives import Agreement
from tests.python import PYTHON
from tests.sharding.pool import Pool, pools

from .commands import RECIPES, arguments
from .waits import Waits

# The bar is also drawn when its batches are as many as the run's steps: two micro-batches a step, so within a log.
STEPS, EVERY = 16, 4

PROGRAM = """
import importlib, json, sys
from tests.recipes.waits import Waits

sys.path.insert(0, sys.argv[2])
program = importlib.import_module(sys.argv[1])
with Waits() as waits:
    program.main(sys.argv[3:])
print("\\n" + json.dumps([waits.after(step) for step in range(17)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", ["pretrain", "pretrain_accelerate", "pretrain_hf_trainer"])
def test_a_program_waits_where_it_logs_only(program: str, tmp_path: Path, corpus_folder: Path) -> None:
    """All callbacks, the progress bar, clipping and accumulation are on; the first step creates what later ones use."""
    pytest.importorskip("jsonargparse")
    options = ["--trainer.log_every_n_steps", str(EVERY)]
    options += ["--checkpoint.every_n_train_steps", "100", "--trainer.val_check_interval", "1000"]
    options += ["--trainer.accumulate_grad_batches", "2", "--trainer.enable_progress_bar", "true"]
    command = [PYTHON, "-c", PROGRAM, program, str(RECIPES), *arguments(tmp_path, corpus_folder, STEPS, *options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    waited = json.loads(done.stdout.splitlines()[-1])
    for step in (2, 5, 6, 9, 10, 13, 14):
        assert not waited[step], waited[step]
    for step in (EVERY, 2 * EVERY):
        assert waited[step]
        early = [wait for wait in waited[step - 1] if "callbacks/lr_monitor.py" not in wait]  # it logs as a step begins
        assert not early, early


@pytest.fixture
def trainer() -> Any:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = AMAdamW([param])
    param.grad = torch.ones(3)
    optimizer.step()
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda tensor, reduce_op: tensor)
    return SimpleNamespace(global_step=0, world_size=2, strategy=strategy, optimizers=[optimizer])


def end_step(callback: Any, trainer: Any) -> Waits:
    trainer.global_step += 1
    loss = torch.tensor(2.0)
    with Waits() as waits:
        callback.on_train_batch_end(trainer, None, loss, None, 0)
    return waits


def test_the_detector_sees() -> None:
    device, host = torch.device("cpu"), torch.zeros(2)
    value = torch.ones(2, device=device)
    rows = torch.ones(2)
    with Waits() as waits:
        bool(value[0]), float(value[0]), value[0].item()
        value.tolist(), value.cpu(), value.numpy()
        value[value > 0], value.nonzero()
        value.new_tensor(2.0), torch.tensor(2.0, device=device)
        rows = torch.arange(2)
        rows.to(device)
    seen = [what for _, what, _ in waits.seen]
    reads = ["_local_scalar_dense"] * 3 + ["tolist", "cpu", "numpy", "index", "nonzero"]
    assert seen == [*reads, "new_tensor", "tensor", "to"]
    with Waits() as waits:
        host = torch.arange(2)
        moved = host.to(device, non_blocking=True)
        moved.to(device), value.to(torch.float64), torch.full_like(value, 2.0), value[0] + 1.0
    assert not waits.seen


@pytest.fixture(scope="module")
def pair() -> Iterator[Pool]:
    with pools() as start:
        yield start(2)


def agree_later(says: list[list[int | None]], now: list[int]) -> list[int]:
    """Return the answers that one of two ranks gets if they are delayed, as on an accelerator."""
    mine = says[torch.distributed.get_rank()]
    agreement = Agreement(torch.device("cpu"), 2, later=True)
    return [agreement.ask(say, now=question in now) for question, say in enumerate(mine)]


def test_ranks_hear_one_question_later_or_at_once(pair: Pool) -> None:
    says = [[0, 0, 1, None, None, 0, 0, 2], [0, 3, 0, None, None, 0, 0, 0]]
    for heard in pair.run("tests.recipes.test_waits:agree_later", says=says, now=[7]):
        assert heard == [0, 0, 3, 1, 0, 0, 0, 2]


def test_fault_tolerance_asks_at_its_interval(trainer: Any) -> None:
    """It also asks when the Trainer logs, in the last step, before a validation and in an epoch's last batch."""
    callback = FaultTolerance(check_every_n_steps=2)
    asked: list[tuple[int, int | None, bool]] = []
    callback._agreement = SimpleNamespace(
        ask=lambda mine, now: asked.append((trainer.global_step, mine, now)) or 0,
    )
    trainer.log_every_n_steps, trainer.max_steps, trainer.is_last_batch = 4, 6, False
    trainer.val_check_batch, trainer.check_val_every_n_epoch, trainer.accumulate_grad_batches = float("inf"), 1, 1
    for _ in range(6):
        end_step(callback, trainer)
    assert asked == [(1, None, False), (2, 0, False), (3, None, False), (4, 0, True), (5, None, False), (6, 0, True)]
    asked.clear()
    trainer.log_every_n_steps, trainer.max_steps, trainer.val_check_batch, trainer.global_step = 0, -1, 5, 0
    trainer.check_val_every_n_epoch, trainer.accumulate_grad_batches = None, 2
    for batch in (1, 3, 5, 7, 9):
        trainer.fit_loop = SimpleNamespace(total_batch_idx=batch)
        end_step(callback, trainer)
    assert [now for _, _, now in asked] == [False, True, False, False, True]


def test_alone_one_hears_oneself_at_once_and_for_nothing() -> None:
    agreement = Agreement(torch.device("meta"), 1)
    assert [agreement.ask(say) for say in (0, 2, None)] == [0, 2, 0]
