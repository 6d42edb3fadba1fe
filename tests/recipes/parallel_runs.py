"""Functions that each rank runs: the recipe's Llama in a real Trainer under a strategy, with a record of every step."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from am_lightning import AdaptiveMemory, AMAdamW
from am_lightning.distributed.names import strip_wrappers
from am_lightning.optim.unwrap import unwrap_optimizer
from am_lightning.pretrain.model.lightning_module import LlamaPretraining
from tests.lightning.cluster import CPUFSDP, Memory, on_cpu
from tests.lightning.model import quiet

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "num_layers": 2,
    "vocab_size": 64,
    "seq_len": 16,
}
ROWS, STEPS, RATE = 8, 6, 3e-2
LONGEST = timedelta(seconds=80)


def strategy_of(name: str, world: int) -> Any:
    if world == 1 and name == "ddp":
        return "auto"
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo", timeout=LONGEST)
    if name == "fsdp1":
        return CPUFSDP(state_dict_type="sharded", timeout=LONGEST)
    if name.startswith("zero"):
        from tests.deepspeed.entry_points import OnCPU, zero_config  # needs DeepSpeed's compiled operator

        return OnCPU(config=zero_config(int(name[4:])))
    tensor = int(name.partition("tp")[2] or 1)
    return ModelParallelStrategy(data_parallel_size=world // tensor, tensor_parallel_size=tensor, timeout=LONGEST)


class Watched(LlamaPretraining):
    """Train on fixed rows, and record losses and momentum."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.losses: list[Tensor] = []
        self.betas: list[dict[str, float]] = []
        self.first: dict[str, Tensor] = {}

    def share(self) -> tuple[int, int]:
        if self.device_mesh is not None:
            data = self.device_mesh["data_parallel"]
            return data.get_local_rank(), data.size()
        return self.trainer.global_rank, self.trainer.world_size

    def configure_model(self) -> None:
        on_cpu(super().configure_model)
        if not self.first:
            self.first = {
                strip_wrappers(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
                for name, p in self.network.named_parameters()
            }

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.arange(100), batch_size=None)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        index, of = self.share()
        generator = torch.Generator().manual_seed(int(batch))
        # Some tokens are frequent, so that there is something to learn.
        rows = torch.randint(64, (ROWS, self.shape.seq_len), generator=generator) ** 2 // 64
        loss = super().training_step(rows.chunk(of)[index].to(self.device), batch_idx)
        self.losses.append(loss.detach().double())
        return loss

    def on_train_batch_end(self, *arguments: Any) -> None:
        optimizer: Any = unwrap_optimizer(self.trainer.optimizers[0])
        self.betas.append({name: float(beta) for name, beta in optimizer.momentum().items()})


def fit(name: str, *, precision: str = "32-true", clip: float | None = 0.5, **options: Any) -> dict[str, Any]:
    """Train on all ranks of the pool, or in this process without a pool.

    Returns:
        ``losses`` (over the whole batch, by step), ``betas`` by step, ``norms`` of the gradient by step, ``first``:
        the initial weights.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    world, plugins = 1, []
    if dist.is_initialized():
        world = dist.get_world_size()
        os.environ["LOCAL_RANK"] = str(dist.get_rank())  # as after a launch, so that Lightning starts no processes
        plugins.append(LightningEnvironment())
    L.seed_everything(0, verbose=False)
    module = Watched(**{**SHAPE, "optimizer": partial(AMAdamW, lr=RATE, betas=(0.89, 0.95)), **options})
    memory = Memory()
    trainer = L.Trainer(
        **quiet(
            devices=world,
            strategy=strategy_of(name, world),
            plugins=plugins,
            precision=precision,
            max_steps=STEPS,
            gradient_clip_val=clip,
            callbacks=[AdaptiveMemory()],
            logger=memory,
            log_every_n_steps=1,
        )
    )
    trainer.fit(module)
    losses = torch.stack(module.losses)
    if world > 1:
        dist.all_reduce(losses)
    return {
        "losses": (losses / world).tolist(),
        "betas": module.betas,
        "norms": [logged["am/grad_norm"] for logged in memory.logged if "am/grad_norm" in logged],
        "first": module.first if int(os.environ.get("LOCAL_RANK", "0")) == 0 else {},
    }
