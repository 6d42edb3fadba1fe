"""Runs of two ranks under DeepSpeed's ZeRO, saved by the engine, one of them converted by ``ds_to_universal``."""

from __future__ import annotations

import logging
import os
import sysconfig
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"  # ninja is beside python
os.environ.setdefault("LOCAL_RANK", os.environ.get("RANK", "0"))

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from am_lightning.deepspeed import attach
from tests.checkpoints.layouts import ZERO, RankRun
from tests.checkpoints.net import Net
from tests.checkpoints.plain import adamw, groups_of
from tests.checkpoints.saved import differences, write

deepspeed.utils.logger.setLevel(logging.ERROR)


class ZeroRun(RankRun):
    def __init__(self, name: str, *, universal: bool) -> None:
        (self.stage, scope), self.rate, self.name = ZERO[name], 0.1, name
        net = Net(torch.float32)
        self.optimizer = adamw(groups_of(net), self.rate, scope)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": self.stage,
                "sub_group_size": 40,
                "overlap_comm": False,
                "stage3_param_persistence_threshold": 0,
            },
            "checkpoint": {"load_universal": universal},
        }
        self.model, *_ = deepspeed.initialize(model=net, optimizer=self.optimizer, config=config)
        attach(self.model)

    def advance(self, step: int) -> None:
        self.model.backward(self.model(step))
        self.model.step()

    def save(self, folder: Path) -> None:
        self.model.save_checkpoint(str(folder), tag="saved")

    def load(self, folder: Path) -> None:
        tag = "universal" if (folder / "universal").exists() else "saved"
        path, _ = self.model.load_checkpoint(str(folder), tag=tag)
        assert path is not None

    def weights(self) -> dict[str, Tensor]:
        found = {}
        for name, param in self.model.module.named_parameters():
            with deepspeed.zero.GatheredParameters([param], enabled=self.stage == 3):
                found[name] = param.detach().clone()
        return found

    def optimizer_state(self) -> dict[str, Any]:
        """Return the state as the engine saves it: only then ZeRO-3's optimizer has its parameters in its groups."""
        whole = self.model.optimizer.state_dict()
        found = whole["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
        return {"state": found["state"]} if self.name == "zero3_universal" else dict(found)


def save(name: str, folder: str) -> None:
    write(ZeroRun(name, universal=False), Path(folder), dist.get_rank())


def resume(name: str, folder: str) -> list[str]:
    return differences(ZeroRun(name, universal=name.endswith("_universal")), Path(folder), dist.get_rank())
