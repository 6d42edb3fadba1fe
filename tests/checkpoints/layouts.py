"""Runs of two ranks under FSDP2 and FSDP1, saved by torch alone: call ``LAYOUTS[name]()`` on every rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from tests.checkpoints.net import Block, Net, rate_of
from tests.checkpoints.plain import adamw, groups_of, set_rate, sgd
from tests.checkpoints.saved import Betas, differences, write


class RankRun:
    """This rank's part of a model and its optimizer."""

    cap = 0.89
    model: Any
    optimizer: Any
    rate: float

    def train(self, steps: range) -> Betas:
        seen = []
        for step in steps:
            set_rate(self.optimizer, rate_of(step, self.rate))
            self.advance(step)
            seen.append({name: float(beta) for name, beta in self.optimizer.momentum().items()})
        return seen

    def advance(self, step: int) -> None:
        self.optimizer.zero_grad()
        self.model(step).backward()
        self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        named = [(name, param.detach()) for name, param in self.model.named_parameters()]
        return {name: param.to_local() if isinstance(param, DTensor) else param for name, param in named}

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()


class Fsdp2(RankRun):
    def __init__(self, make: Callable[..., Any], rate: float, **options: bool) -> None:
        self.model, self.rate, self.options = Net(), rate, StateDictOptions(**options)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (self.model.first, self.model.second, self.model):
            fully_shard(module, mesh=mesh)
        self.optimizer = make(groups_of(self.model), rate)

    def parts(self) -> dict[str, Any]:
        states = get_optimizer_state_dict(self.model, self.optimizer, options=self.options)
        return {"model": get_model_state_dict(self.model), "optimizer": states}

    def save(self, folder: Path) -> None:
        dcp.save(self.parts(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        parts = self.parts()
        dcp.load(parts, checkpoint_id=folder)
        set_model_state_dict(self.model, parts["model"])
        set_optimizer_state_dict(self.model, self.optimizer, parts["optimizer"], options=self.options)


class Fsdp1(RankRun):
    """A run with ``flat`` parameters (use_orig_params=False) in one group."""

    def __init__(self, make: Callable[..., Any], rate: float, *, flat: bool = False, sharded: bool = False) -> None:
        policy = ModuleWrapPolicy({Block})
        cpu = torch.device("cpu")
        self.model = FSDP(Net(), auto_wrap_policy=policy, use_orig_params=not flat, device_id=cpu)
        self.rate, self.sharded = rate, sharded
        self.optimizer = make(list(self.model.parameters()) if flat else groups_of(self.model), rate)
        self.optimizer.bind_model(self.model)

    def kind(self) -> Any:
        if self.sharded:
            configs = ShardedStateDictConfig(offload_to_cpu=False), ShardedOptimStateDictConfig(offload_to_cpu=False)
            return FSDP.state_dict_type(self.model, StateDictType.SHARDED_STATE_DICT, *configs)
        whole = FullStateDictConfig(offload_to_cpu=False), FullOptimStateDictConfig(offload_to_cpu=False)
        return FSDP.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, *whole)

    def save(self, folder: Path) -> None:
        with self.kind():
            parts = {"model": self.model.state_dict(), "optim": FSDP.optim_state_dict(self.model, self.optimizer)}
        if self.sharded:
            dcp.save(parts, checkpoint_id=folder)
        elif dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(parts, folder / "full.pt")

    def load(self, folder: Path) -> None:
        with self.kind():
            parts = self.read(folder)
            self.model.load_state_dict(parts["model"])
            states = FSDP.optim_state_dict_to_load(self.model, self.optimizer, parts["optim"])
        self.optimizer.load_state_dict(states)

    def read(self, folder: Path) -> Any:
        if not self.sharded:
            return torch.load(folder / "full.pt", weights_only=True)
        parts, reader = {"model": self.model.state_dict()}, dcp.FileSystemReader(folder)
        dcp.load(parts, storage_reader=reader)
        return parts | load_sharded_optimizer_state_dict(parts["model"], "optim", reader)


LAYOUTS: dict[str, Callable[[], RankRun]] = {
    "fsdp2_adamw_tensor": partial(Fsdp2, adamw, 0.1),
    "fsdp2_adamw_global": partial(Fsdp2, partial(adamw, scope="global"), 0.1),
    "fsdp2_adamw_flat_dict": partial(Fsdp2, adamw, 0.1, flatten_optimizer_state_dict=True),
    "fsdp2_sgd_global": partial(Fsdp2, sgd, 0.3),
    "fsdp1_adamw_full": partial(Fsdp1, adamw, 0.1),
    "fsdp1_adamw_sharded": partial(Fsdp1, adamw, 0.1, sharded=True),
    "fsdp1_sgd_full": partial(Fsdp1, sgd, 0.3),
    "fsdp1_flat_adamw_full": partial(Fsdp1, partial(adamw, scope="global"), 0.1, flat=True),
    "fsdp1_flat_adamw_sharded": partial(Fsdp1, partial(adamw, scope="global"), 0.1, flat=True, sharded=True),
}

# Name -> (stage, scope). A name that ends in _universal is that of a converted checkpoint.
ZERO = {
    "zero1": (1, "tensor"),
    "zero2": (2, "tensor"),
    "zero3": (3, "tensor"),
    "zero1_global": (1, "global"),
    "zero3_global": (3, "global"),
    "zero2_universal": (2, "tensor"),
    "zero3_universal": (3, "tensor"),
}


def save(name: str, folder: str) -> None:
    write(LAYOUTS[name](), Path(folder), dist.get_rank())


def resume(name: str, folder: str) -> list[str]:
    return differences(LAYOUTS[name](), Path(folder), dist.get_rank())
