"""Worker of the DDP tests, ``python -m tests.lightning.ddp_worker JOB.json``: every rank writes what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from am_lightning import AdaptiveMemory
from tests.lightning.model import Regression, quiet


class Count(pl.Callback):
    """Count the all-reduces called from Python in training steps (DDP reduces its own gradient buckets in C++)."""

    calls = 0

    def on_train_start(self, trainer, pl_module) -> None:
        original = dist.all_reduce

        def counted(*args, **kwargs):
            Count.calls += 1
            return original(*args, **kwargs)

        dist.all_reduce = counted


def main(path: Path) -> None:
    job = json.loads(path.read_text())
    world = job["world"]
    module = Regression(width=job["width"]).double()  # the overshoot would amplify rounding errors
    strategy = DDPStrategy(process_group_backend="gloo") if world > 1 else "auto"
    count = Count()
    trainer = pl.Trainer(
        **quiet(
            devices=world,
            strategy=strategy,
            max_steps=job["steps"],
            callbacks=[AdaptiveMemory(scope=job["scope"]), count],
            default_root_dir=str(path.parent),
        )
    )
    trainer.fit(module, ckpt_path=job.get("resume"), weights_only=True if job.get("resume") else None)
    if job.get("save"):
        trainer.save_checkpoint(job["save"])
    optimizer = trainer.optimizers[0]
    result = {
        "seen": module.seen,
        "weights": {name: p.detach().clone() for name, p in module.net.named_parameters()},
        "state": optimizer.state_dict()["state"],
        "all_reduces": Count.calls,
        "steps": trainer.global_step,
        "threads": torch.get_num_threads(),
    }
    torch.save(result, f"{path}.rank{trainer.global_rank}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    import os

    rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.set_num_threads(1 + rank)  # each rank adds in another order
    main(Path(sys.argv[1]))
