"""The ways to save and load a run with torch alone: ``PATHS[name]`` builds, saves and loads at any world size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from tests.sharding.layouts import Placed, ddp, everyone, fsdp1, fsdp2, mesh, shard, tensor_parallel
from tests.sharding.model import make_net

Builder = Callable[[torch.dtype], Placed]
Move = Callable[[nn.Module, Optimizer, Path], None]  # saves or loads; every rank calls it


def plain(dtype: torch.dtype) -> Placed:
    return Placed(make_net(dtype), (0, 1))


def or_plain(builder: Builder) -> Builder:
    """Return the model unsharded in one process, because a full checkpoint needs no sharding to be loaded."""
    return lambda dtype: (plain if dist.get_world_size() == 1 else builder)(dtype)


def grid(first: str, second: str) -> Any:
    """Return a mesh of 1 x 1, 1 x 2 or 2 x 2."""
    shape = {1: (1, 1), 2: (1, 2), 4: (2, 2)}[dist.get_world_size()]
    return mesh(*shape, names=(first, second))


def hsdp(dtype: torch.dtype) -> Placed:
    return Placed(shard(make_net(dtype), mesh=grid("replicate", "shard")), everyone())


def fsdp2_tp(dtype: torch.dtype) -> Placed:
    both = grid("dp", "tp")
    net = shard(tensor_parallel(make_net(dtype), both["tp"]), mesh=both["dp"])
    return Placed(net, (both["dp"].get_local_rank(), both["dp"].size()))


# ---------------------------------------------------------------- plain state_dict
def save_plain(model: nn.Module, optimizer: Optimizer, where: Path) -> None:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    _save_on_rank0((inner.state_dict(), optimizer.state_dict()), where)


def load_plain(model: nn.Module, optimizer: Optimizer, where: Path) -> None:
    weights, states = _read(where)
    (model.module if isinstance(model, DistributedDataParallel) else model).load_state_dict(weights)
    optimizer.load_state_dict(states)


def _save_on_rank0(checkpoint: Any, where: Path) -> None:
    if dist.get_rank() == 0:
        where.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, where / "full.pt")
    dist.barrier()


def _read(where: Path) -> Any:
    return torch.load(where / "full.pt", weights_only=True)


# ---------------------------------------------------------------- torch.distributed.checkpoint
def save_sharded(model: nn.Module, optimizer: Optimizer, where: Path) -> None:
    parts = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.save(parts, checkpoint_id=where)


def load_sharded(model: nn.Module, optimizer: Optimizer, where: Path, planner: Any = None) -> None:
    parts = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.load(parts, checkpoint_id=where, planner=planner)
    set_model_state_dict(model, parts["model"])
    set_optimizer_state_dict(model, optimizer, parts["optim"])


def load_partly(model: nn.Module, optimizer: Optimizer, where: Path) -> None:
    """Load a checkpoint of AdamW, which lacks the adaptive scalars."""
    load_sharded(model, optimizer, where, DefaultLoadPlanner(allow_partial_load=True))


def full_options(model: nn.Module, **options: bool) -> StateDictOptions:
    """Return the options of a full state dict. FSDP1 must not offload it to the CPU, or it frees shared storage."""
    return StateDictOptions(full_state_dict=True, cpu_offload=not isinstance(model, FSDP), **options)


def save_full(model: nn.Module, optimizer: Optimizer, where: Path) -> None:
    options = full_options(model)
    weights = get_model_state_dict(model, options=options)
    _save_on_rank0((weights, get_optimizer_state_dict(model, optimizer, options=options)), where)


def load_full(model: nn.Module, optimizer: Optimizer, where: Path, *, broadcast: bool = False) -> None:
    """Load a full checkpoint; with ``broadcast`` only rank 0 reads the file.

    set_state_dict is not used, because it skips ranks that are given nothing.
    """
    options = full_options(model, broadcast_from_rank0=broadcast)
    weights, states = _read(where) if dist.get_rank() == 0 or not broadcast else ({}, {})
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(model, optimizer, states, options=options)


def load_broadcast(model: nn.Module, optimizer: Optimizer, where: Path) -> None:
    load_full(model, optimizer, where, broadcast=True)


# ---------------------------------------------------------------- FSDP1
def fsdp1_full(model: nn.Module) -> Any:
    configs = FullStateDictConfig(offload_to_cpu=False), FullOptimStateDictConfig(offload_to_cpu=False)
    return FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT, *configs)


def fsdp1_sharded(model: nn.Module) -> Any:
    configs = ShardedStateDictConfig(offload_to_cpu=False), ShardedOptimStateDictConfig(offload_to_cpu=False)
    return FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, *configs)


def save_fsdp1_full(model: nn.Module, optimizer: Optimizer, where: Path) -> None:
    with fsdp1_full(model):
        _save_on_rank0((model.state_dict(), FSDP.optim_state_dict(model, optimizer)), where)


def load_fsdp1_full(model: nn.Module, optimizer: Optimizer, where: Path) -> None:
    if not isinstance(model, FSDP):
        return load_full(model, optimizer, where)
    weights, states = _read(where)
    with fsdp1_full(model):
        model.load_state_dict(weights)
        optimizer.load_state_dict(FSDP.optim_state_dict_to_load(model, optimizer, states))


def save_fsdp1_sharded(model: nn.Module, optimizer: Optimizer, where: Path) -> None:
    with fsdp1_sharded(model):
        dcp.save({"model": model.state_dict(), "optim": FSDP.optim_state_dict(model, optimizer)}, checkpoint_id=where)


def load_fsdp1_sharded(model: nn.Module, optimizer: Optimizer, where: Path) -> None:
    """Load as Lightning does; dcp.load into a template of get_optimizer_state_dict fails even for torch.optim.AdamW."""
    reader = dcp.FileSystemReader(where)
    with fsdp1_sharded(model):
        weights = model.state_dict()
        dcp.load({"model": weights}, storage_reader=reader)
        states = load_sharded_optimizer_state_dict(weights, "optim", reader)["optim"]
        model.load_state_dict(weights)
        optimizer.load_state_dict(FSDP.optim_state_dict_to_load(model, optimizer, states))


@dataclass(frozen=True)
class SavePath:
    """A way to save and load. ``reader`` builds the model that loads if it is placed differently."""

    writer: Builder
    save: Move
    load: Move
    reader: Builder | None = None
    cases: tuple[tuple[str, str], ...] = (("adamw", "tensor"),)


PAIRS = ((2, 1), (2, 2), (2, 4), (4, 2))  # ranks that save, ranks that load

BOTH = (("adamw", "tensor"), ("adamw", "global"))
GLOBAL = (("adamw", "global"),)

PATHS = {
    "ddp state_dict": SavePath(ddp, save_plain, load_plain, or_plain(ddp)),
    "fsdp2 sharded": SavePath(fsdp2, save_sharded, load_sharded, cases=(*BOTH, ("sgd", "global"))),
    "fsdp2 full": SavePath(fsdp2, save_full, load_full, or_plain(fsdp2)),
    "fsdp2 full from rank 0": SavePath(fsdp2, save_full, load_broadcast, or_plain(fsdp2)),
    "hsdp sharded": SavePath(hsdp, save_sharded, load_sharded),
    "fsdp2+tp sharded": SavePath(fsdp2_tp, save_sharded, load_sharded),
    "fsdp2 sharded to fsdp2+tp": SavePath(fsdp2, save_sharded, load_sharded, fsdp2_tp),
    "fsdp1 full": SavePath(fsdp1(), save_fsdp1_full, load_fsdp1_full, or_plain(fsdp1()), BOTH),
    "fsdp1 sharded": SavePath(fsdp1(), save_fsdp1_sharded, load_fsdp1_sharded),
    "fsdp1 full by dcp": SavePath(fsdp1(), save_full, load_full, or_plain(fsdp1())),
    "fsdp1 full by dcp from rank 0": SavePath(fsdp1(), save_full, load_broadcast, or_plain(fsdp1())),
    "fsdp1 flat full": SavePath(
        fsdp1(original=False), save_fsdp1_full, load_fsdp1_full, or_plain(fsdp1(original=False)), GLOBAL
    ),
    "fsdp1 flat sharded": SavePath(fsdp1(original=False), save_fsdp1_sharded, load_fsdp1_sharded, cases=GLOBAL),
}
