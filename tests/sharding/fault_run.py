"""A run that saves every second step and may be killed: ``torchrun -m tests.sharding.fault_run DIR [KILL]``.

KILL is ``rank,step,point``: that rank kills itself in that step, at "sums" (its sums are formed, and the other ranks
wait for them in the all-reduce) or at "update" (they are reduced, and the other ranks write). A new launch resumes from
the last checkpoint in DIR. Each rank writes its result to ``DIR/rank<rank>.json``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from tests.sharding.checkpoint_paths import load_sharded, save_sharded
from tests.sharding.fault_steps import DTYPE, RATE, bits, held
from tests.sharding.layouts import Placed, fsdp2
from tests.sharding.model import train
from tests.sharding.steps import optimizer_of

LAST, EVERY = 10, 2


def train_to_the_end(where: str | None = None, kill: str | None = None) -> dict[str, Any]:
    """Train from the last checkpoint in ``where``, or from the start."""
    placed = fsdp2(DTYPE)
    optimizer = optimizer_of(placed, "adamw", "tensor")
    start = resume(placed, optimizer, where)
    seen = []
    for step in range(start, LAST):
        if kill is not None and kill.split(",")[:2] == [str(dist.get_rank()), str(step)]:
            die_at(kill.split(",")[2], optimizer)
        seen += train(placed.model, optimizer, range(step, step + 1), DTYPE, share=placed.share, rate=RATE)
        if where is not None and (step + 1) % EVERY == 0:
            save(placed, optimizer, Path(where), step + 1)
    return {"start": start, "bits": bits(seen), "held": held(placed.model, optimizer)}


def save(placed: Placed, optimizer: Optimizer, where: Path, step: int) -> None:
    save_sharded(placed.model, optimizer, where / f"step{step}")
    if dist.get_rank() == 0:
        (where / "latest.part").write_text(str(step))
        (where / "latest.part").rename(where / "latest")


def resume(placed: Placed, optimizer: Optimizer, where: str | None) -> int:
    if where is None or not (Path(where) / "latest").exists():
        return 0
    step = int((Path(where) / "latest").read_text())
    load_sharded(placed.model, optimizer, Path(where) / f"step{step}")
    return step


def die_at(point: str, optimizer: Any) -> None:
    layout = optimizer.current_layout()
    reduce = layout.all_reduce

    def dying(*arguments: Any) -> Any:
        if point == "update":
            reduce(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    layout.all_reduce = dying


def main(where: str, kill: str | None = None) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent when another rank died, which this rank must find itself
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    answer = Path(where) / f"rank{dist.get_rank()}.json"
    try:
        result = train_to_the_end(where, kill)
    except Exception as error:
        answer.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        os._exit(1)  # the group is broken: an orderly exit could hang
    answer.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
