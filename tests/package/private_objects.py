"""Build objects whose private attributes no class has, and check whether a name exists.

As a program it checks all names of the table in a process of its own, whose process group, Accelerator and Trainer do
not affect other tests. It prints one JSON object: the key of a name -> "there", or the problem.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.package.private_names import ACCELERATE, LIGHTNING, LITDATA, TIMM, TORCH, TRANSFORMERS, Private

THERE, ABSENT = "there", "not needed: "


def version_of(library: str) -> str | None:
    """Return the installed version, or None if it is not installed."""
    if importlib.util.find_spec(library) is None:
        return None
    return importlib.metadata.version(library)


def why_not_looked_up(row: Private) -> str | None:
    """Return the reason why this environment cannot have or need the name, or None if it must exist."""
    for package in (row.library, *row.needs):
        if version_of(package) is None:
            return f"{package} is not installed"
    version = _numbers(version_of(row.library) or "")
    if row.since is not None and version < _numbers(row.since):
        return f"read from {row.library} {row.since} on"
    if row.until is not None and version >= _numbers(row.until):
        return f"read before {row.library} {row.until} only"
    return None


def problem_of(row: Private) -> str | None:
    """Return what a maintainer must know if the name has disappeared, or None if it exists."""
    try:
        operator.attrgetter(row.name)(_imported(row.owner) if row.made_by is None else MAKERS[row.made_by]())
    except (AttributeError, ImportError) as error:
        version, files = version_of(row.library), ", ".join(row.where)
        cure = row.cure.format(library=row.library)
        reads = "reads" if len(row.where) == 1 else "read"
        text = f"{row.key} is gone ({row.library} {version}): {files} {reads} it in order to {row.why}. {cure}."
        return f"{text} ({type(error).__name__}: {error})"
    return None


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _imported(path: str) -> Any:
    """Return a module, or an attribute of the longest part of the path that is one."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{path}.".startswith(f"{error.name}."):
                raise
            continue
        return functools.reduce(getattr, parts[length:], module)
    raise ImportError(f"there is no {path}")


# ------------------------------------------------------------------ torch
def optimizer() -> Any:
    return torch.optim.AdamW(nn.Linear(2, 2).parameters())


def fused_adamw() -> Any:
    return torch.optim.AdamW(nn.Linear(2, 2).parameters(), fused=True)


def stepped_optimizer() -> Any:
    chosen = optimizer()
    torch.optim.lr_scheduler.ConstantLR(chosen)
    chosen.step()
    return chosen


def scheduler() -> Any:
    return torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), lambda step: 1.0)


def scheduled_step() -> Any:
    return stepped_optimizer().step


def _start_group() -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _fsdp1(**options: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    _start_group()
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(nn.Linear(2, 2), device_id=cpu, use_orig_params=True, **options)


def fsdp1() -> Any:
    return _fsdp1()


def flat_parameter() -> Any:
    return fsdp1()._handle.flat_param


def hybrid_fsdp1() -> Any:
    import torch.distributed as dist
    from torch.distributed.fsdp import ShardingStrategy

    _start_group()
    groups = (dist.new_group([0]), dist.new_group([0]))
    return _fsdp1(process_group=groups, sharding_strategy=ShardingStrategy.HYBRID_SHARD)


def checkpoint_wrapper() -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper as wrap

    return wrap(nn.Linear(2, 2))


def compiled_module() -> Any:
    return torch.compile(nn.Linear(2, 2))


# ------------------------------------------------------------------ Lightning and Accelerate
def trainer() -> Any:
    from lightning.pytorch import Trainer

    return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)


def epoch_loop() -> Any:
    return trainer().fit_loop.epoch_loop


def lightning_module() -> Any:
    from lightning.pytorch import LightningModule

    return LightningModule()


def model_checkpoint() -> Any:
    from lightning.pytorch.callbacks import ModelCheckpoint

    return ModelCheckpoint()


def fabric_module() -> Any:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    return fabric.setup_module(nn.Linear(2, 2))


def _strategy(name: str) -> Any:
    return getattr(importlib.import_module("lightning.pytorch.strategies"), name)()


def _reporter(name: str) -> Any:
    return getattr(importlib.import_module("transformers.integrations"), name)()


def accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True)


MAKERS: dict[str, Callable[[], Any]] = {
    **{
        make.__name__: functools.cache(make)
        for make in (
            optimizer, fused_adamw, stepped_optimizer, scheduled_step, scheduler, fsdp1, hybrid_fsdp1,
            checkpoint_wrapper, flat_parameter, compiled_module, trainer, epoch_loop, lightning_module,
            model_checkpoint, fabric_module, accelerator,
        )
    },
    "ddp_strategy": functools.partial(_strategy, "DDPStrategy"),
    "fsdp_strategy": functools.partial(_strategy, "FSDPStrategy"),
    "model_parallel_strategy": functools.partial(_strategy, "ModelParallelStrategy"),
    **{row.made_by: functools.partial(_reporter, row.made_by) for row in TRANSFORMERS if row.made_by},
}  # fmt: skip


def main() -> None:
    import torch.distributed as dist

    found = {}
    # Names that inspect a process group are checked before the first one is built.
    for row in [*LIGHTNING, *ACCELERATE, *TORCH, *TRANSFORMERS, *TIMM, *LITDATA]:
        reason = why_not_looked_up(row)
        found[row.key] = ABSENT + reason if reason else problem_of(row) or THERE
    print(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
