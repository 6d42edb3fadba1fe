"""Functions that each rank runs: optimizers given during a run, beside those that DeepSpeed's engine steps."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning.fabric import Fabric
from lightning.pytorch.plugins.environments import LightningEnvironment

from am_lightning import AdaptiveMemory, AMAdamW, am_adamw
from am_lightning.huggingface import AdaptiveMemoryCallback
from am_lightning.lightning import attach as attach_fabric
from am_lightning.optim.unwrap import unwrap_optimizer
from tests.deepspeed.entry_points import FabricOnCPU, Module, OnCPU, zero_config
from tests.deepspeed.runs import config_of, make_net
from tests.huggingface.trainer_runs import FORMS, make_trainer
from tests.lightning.model import quiet

AGAIN, STEPS = 2, 5


def said(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Again(Module):
    """Give the Trainer an optimizer during the run."""

    def __init__(self, way: str) -> None:
        super().__init__("tensor")
        self.way, self.steps, self.new = way, 0, None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx != AGAIN:
            return
        self.new = torch.optim.AdamW(self.parameters(), lr=0.01)
        if self.way == "assigned":
            self.trainer.optimizers = [self.new]
        elif self.way == "put into the list":
            self.trainer.optimizers[0] = self.new
        elif self.way == "set up again":
            self.trainer.strategy.setup_optimizers(self.trainer)
        elif self.way == "the same one":
            self.trainer.optimizers = list(self.trainer.optimizers)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps += 1


def lightning(way: str, stage: int = 2, ours: bool = True) -> dict[str, Any]:
    config = zero_config(stage)
    if not ours:
        config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    trainer = pl.Trainer(
        **quiet(
            devices=dist.get_world_size(),
            strategy=OnCPU(config=config),
            plugins=[LightningEnvironment()],
            max_steps=STEPS,
            callbacks=[AdaptiveMemory()] if ours else [],
        )
    )
    module = Again(way)
    text = said(lambda: trainer.fit(module))
    return {"said": text, "steps": module.steps, "stepped": bool(module.new.state)}


def trainer(folder: str, stage: int = 2) -> str:
    """Give transformers' Trainer an AMAdamW beside its engine."""

    class Replace(AdaptiveMemoryCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == AGAIN:
                made.optimizer = AMAdamW(made.model.parameters(), lr=0.05)

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        PartialState(backend="gloo")
        config = {**config_of(stage, clip=0.0), "train_micro_batch_size_per_gpu": 2}
        arguments = {"max_grad_norm": 0.0, "save_strategy": "no", "ddp_backend": "gloo", "report_to": "none"}
        arguments |= {"deepspeed": config, "accelerator_config": {"use_configured_state": True}, "use_cpu": False}
        made = make_trainer(
            Path(folder), batch=2, callbacks=[Replace()], arguments=arguments, optimizer_cls_and_kwargs=FORMS["class"]
        )
        text = said(made.train)
        return f"{made.state.global_step} {text}"
    finally:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def fabric(stage: int = 2) -> list[str]:
    """Call ``attach`` with the engine's optimizer, and with another one."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    strategy = FabricOnCPU(config=config_of(stage))
    runner = Fabric(
        accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, plugins=[LightningEnvironment()]
    )
    runner.launch()
    net = make_net().float()
    model, wrapped = runner.setup(net, am_adamw(net, lr=0.1))
    other = AMAdamW(unwrap_optimizer(wrapped).param_groups[0]["params"], lr=0.1)
    return [said(partial(attach_fabric, runner, model, optimizer)) for optimizer in (wrapped, other)]
