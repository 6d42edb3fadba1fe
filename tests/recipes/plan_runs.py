"""Functions that each rank runs to measure a step: the allocator's peak memory, and bytes sent, under a strategy."""

from __future__ import annotations

import gc
import json
import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from am_lightning import AdaptiveMemory, AMAdamW
from am_lightning.pretrain.model.lightning_module import LlamaPretraining
from tests.device import ON_GPU
from tests.lightning.model import quiet
from tests.recipes.parallel_runs import strategy_of
from tests.recipes.wire import bytes_sent

STEPS = 3
ZERO_BUCKET = 5_000_000  # elements; DeepSpeed's default would be larger than the models measured here


class Rows(LlamaPretraining):
    """Read rows of random tokens."""

    def __init__(self, rows: int, **options: Any) -> None:
        super().__init__(**options)
        self.rows = rows

    def train_dataloader(self) -> DataLoader[Tensor]:
        rows = torch.randint(self.shape.vocab_size, (1, self.rows, self.shape.seq_len))
        return DataLoader(rows.expand(100, -1, -1), batch_size=None)


class WholeSteps(L.Callback):
    """Record the bytes sent at the end of every optimizer step."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.global_step > len(self.sent):
            dist.barrier()
            self.sent.append(bytes_sent())


def measure(
    folder: str, name: str, rows: int, accumulate: int, precision: str, shape: dict[str, Any]
) -> dict[str, int]:
    """Train STEPS steps.

    Returns:
        ``peak``: the largest number of bytes that torch's allocator held since before the model was built; ``sent``:
        bytes sent in the last step.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    os.environ["LOCAL_RANK"] = str(dist.get_rank())  # as after a launch, so that Lightning starts no processes
    gc.collect()
    steps = WholeSteps()

    def fit() -> None:
        module = Rows(rows, **{"optimizer": partial(AMAdamW, lr=1e-3), **shape})
        trainer = L.Trainer(
            **quiet(
                devices=dist.get_world_size(),
                strategy=_strategy(name),
                plugins=[LightningEnvironment()],
                precision=precision,
                max_steps=STEPS,
                accumulate_grad_batches=accumulate,
                callbacks=[AdaptiveMemory(), steps],
            )
        )
        trainer.fit(module)

    trace = Path(folder, f"{name}-{dist.get_rank()}.json")
    peak = _peak_on_gpu(fit) if ON_GPU else _peak_on_cpu(fit, trace)
    return {"peak": peak, "sent": steps.sent[-1] - steps.sent[-2]}


def _strategy(name: str) -> Any:
    if not name.startswith("zero"):
        return strategy_of(name, dist.get_world_size())
    from tests.deepspeed.entry_points import OnCPU, zero_config  # needs DeepSpeed's compiled operator

    config = zero_config(int(name[4:]))
    del config["zero_optimization"]["sub_group_size"]  # so small that every tensor is split
    config["zero_optimization"] |= {"reduce_bucket_size": ZERO_BUCKET, "allgather_bucket_size": ZERO_BUCKET}
    return OnCPU(config=config)


def _peak_on_gpu(action: Callable[[], None]) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(action: Callable[[], None], trace: Path) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    trace.unlink()
    return _peak(events)


def _peak(events: list[dict[str, Any]]) -> int:
    """Return the largest sum of allocated and not yet freed bytes within the trace."""
    memory = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    alive: dict[int, int] = {}
    total = peak = 0
    for event in memory:
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        total -= alive.pop(address, 0)
        if size > 0:
            alive[address] = size
            total += size
            peak = max(peak, total)
    return peak
