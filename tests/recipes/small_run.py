"""Runs of a few steps of a tiny model with planned events: python small_run.py '{"root": ...}' ...

The keys are those of `Options`. Signals are raised inside training_step, in the middle of a step, so that a test needs
no clock to hit one. Each of several runs in one process adds a line about its end to ROOT/ended-RANK.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader, Sampler, TensorDataset

from am_lightning import AdaptiveMemory
from am_lightning.lightning.callback import SkippedStepsError
from am_lightning.pretrain.callbacks import fault_tolerance
from am_lightning.pretrain.callbacks.fault_tolerance import FaultTolerance
from am_lightning.pretrain.checkpoints import AtomicCheckpointIO, RunCheckpoint
from am_lightning.pretrain.data.order import ResumableLoader
from am_lightning.pretrain.runtime.collectives import Agreement
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.stop_signals import Stopped
from tests.lightning.cluster import CPUFSDP

ROWS, WIDTH = 512, 8


@dataclass
class Options:
    root: str
    strategy: str = "single"  # ddp, fsdp1, fsdp2
    steps: int = 8
    every: int = 3
    keep: int | None = None
    accumulate: int = 1
    asynchronous: bool = False
    resume: str | None = "last"
    # micro-batch number (over the whole run), or "before" training -> event: a signal's name, "hang", "nan"
    events: dict[str, str] = field(default_factory=dict)
    event_rank: int = 0
    max_skips: int = 100  # max_consecutive_skips of AdaptiveMemory
    fault_tolerance: dict[str, Any] = field(default_factory=dict)
    stop_at: int | None = None  # the micro-batch in which should_stop is set
    validate_every: int | None = None  # micro-batches; the event there is "validation"
    late_answers: bool = False  # the ranks' answer comes one step later, as on accelerators
    truncate: str | None = None  # a file below `root` that loses its second half before the run

    def ended(self, rank: int) -> list[str]:
        """Return how the runs in `root` ended on a rank: finished, stopped STATUS, error: TEXT."""
        return Path(self.root, f"ended-{rank}").read_text().splitlines()


class Steps(Sampler[list[int]]):
    """Return the rows of a step as a function of the step and the rank alone."""

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer

    def __len__(self) -> int:
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[list[int]]:
        trainer = self.trainer
        for batch in range(trainer.global_step * trainer.accumulate_grad_batches, len(self)):
            first = 4 * (batch * trainer.world_size + trainer.global_rank)
            yield [(first + i) * 7 % ROWS for i in range(4)]


class Small(L.LightningModule):
    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.layers: torch.nn.Module | None = None

    def configure_model(self) -> None:
        if self.layers is not None:
            return
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(WIDTH, 16), torch.nn.Tanh(), torch.nn.Linear(16, WIDTH))
        if self.options.strategy == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            for layer in (self.layers[0], self.layers[2], self.layers):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def train_dataloader(self) -> DataLoader[Any]:
        rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
        return ResumableLoader(TensorDataset(rows), batch_sampler=Steps(self.trainer))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = (self.layers(batch[0]) - batch[0].roll(1, dims=1)).square().mean()
        return loss * self.meet(str(batch_idx))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.options.stop_at:
            self.trainer.should_stop = True

    def on_train_epoch_end(self) -> None:
        self.meet("end")

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.zeros(1, WIDTH))) if self.options.validate_every else []

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            Path(self.options.root, f"validated-{self.global_rank}").write_text(str(self.trainer.global_step))
            self.meet("validation")

    def meet(self, moment: str) -> float:
        """Apply the event of this moment; return a factor of the loss."""
        event = self.options.events.get(moment) if self.global_rank == self.options.event_rank else None
        if event == "hang":
            time.sleep(600)
        elif event == "nan":
            return float("nan")
        elif event:
            os.kill(os.getpid(), getattr(signal, event))
        return 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.meet("before")
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trainer_for(options: Options) -> L.Trainer:
    strategies = {
        "single": lambda: SingleDeviceStrategy(torch.device("cpu")),
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp1": lambda: CPUFSDP(process_group_backend="gloo", state_dict_type="sharded"),
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    }
    callbacks = [
        RunCheckpoint(str(Path(options.root, "checkpoints")), options.every, options.keep, options.asynchronous),
        FaultTolerance(**options.fault_tolerance),
        AdaptiveMemory(per_layer=False, histogram=False, max_consecutive_skips=options.max_skips),
    ]
    trainer = L.Trainer(
        default_root_dir=options.root,
        accelerator="cpu",
        devices=1 if options.strategy == "single" else 2,
        strategy=strategies[options.strategy](),
        max_steps=options.steps,
        accumulate_grad_batches=options.accumulate,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        val_check_interval=options.validate_every,
        check_val_every_n_epoch=None if options.validate_every else 1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if options.late_answers:
        fault_tolerance.Agreement = partial(Agreement, later=True)  # type: ignore[misc]
    FaultTolerance.prepare(trainer)
    return trainer


def run(options: Options) -> str:
    """Run, and return how it ended."""
    if options.truncate and os.environ.get("RANK", "0") == "0":
        path = Path(options.root, options.truncate)
        os.truncate(path, path.stat().st_size // 2)
    try:
        trainer_for(options).fit(Small(options), ckpt_path=options.resume)
        return "finished"
    except Stopped as stopped:
        return f"stopped {stopped.code}"
    except (RecipeError, SkippedStepsError) as error:
        return f"error: {error}"


def main() -> None:
    torch.set_num_threads(1)
    several = [Options(**json.loads(text)) for text in sys.argv[1:]]
    if len(several) == 1:
        try:
            trainer_for(several[0]).fit(Small(several[0]), ckpt_path=several[0].resume)
        except RecipeError as error:
            sys.exit(f"error: {error}")
    else:
        for options in several:
            ended = run(options)
            with open(Path(options.root, f"ended-{os.environ['RANK']}"), "a") as file:
                file.write(ended.replace("\n", " ") + "\n")


if __name__ == "__main__":
    main()
