"""Functions that each rank of a pool runs: the sharding tests' net in a real Trainer, under any strategy."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies import fsdp as strategy_module
from torch import Tensor
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, MixedPrecision, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from am_lightning import AdaptiveMemory, AMAdamW, am_adamw
from tests.device import BACKEND, ON_GPU
from tests.lightning.model import quiet
from tests.sharding.layouts import shard, tensor_parallel
from tests.sharding.model import RATES, Block, batch_of, beside, is_plain_decay, lr_of, make_net, raw_betas
from tests.sharding.steps import whole_weights

STEPS = 8
LONGEST = timedelta(seconds=80)


class CPUFSDP(FSDPStrategy):
    """FSDP1 on the CPU, which Lightning's FSDPStrategy refuses and for which torch needs ``device_id``.

    A full state dict must not be offloaded to the CPU, because the copy would share its storage with the shards, which
    are then freed.
    """

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
        strategy_module._get_full_state_dict_context = full_state_dict_context
        return on_cpu(super()._setup_model, model)


def full_state_dict_context(module: torch.nn.Module, world_size: int, rank0_only: bool = True) -> Any:
    """Return Lightning's context of a full state dict, without the offload."""
    return FSDP.state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
        FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
    )


def on_cpu(wrap: Any, *arguments: Any, **options: Any) -> Any:
    """Call ``wrap`` while every FSDP(...) gets ``device_id=cpu``."""
    original = FSDP.__init__

    def init(self: Any, *args: Any, **others: Any) -> None:
        original(self, *args, **{**others, "device_id": torch.device("cpu")})

    FSDP.__init__ = init
    try:
        return wrap(*arguments, **options)
    finally:
        FSDP.__init__ = original


class Wide(FSDPPrecision):
    """Keep float64, which Lightning's own precisions for FSDP1 would cast to float32."""

    def __init__(self) -> None:
        super().__init__("32-true")
        self._desired_input_dtype = torch.float64

    @property
    def mixed_precision_config(self) -> MixedPrecision:
        return MixedPrecision()


def strategy_of(name: str, world: int) -> Any:
    if name.startswith("ddp"):
        alone = world == 1 and name == "ddp"
        return "auto" if alone else DDPStrategy(process_group_backend=BACKEND, timeout=LONGEST)
    if name.startswith("fsdp1"):
        kind = "full" if name.endswith("_full") else "sharded"
        flat = {"use_orig_params": False} if "flat" in name else {}
        policy = {} if name == "fsdp1_inside" else {"auto_wrap_policy": {Block}}
        return (FSDPStrategy if ON_GPU else CPUFSDP)(**policy, state_dict_type=kind, timeout=LONGEST, **flat)
    tp = 2 if "tp" in name else 1
    return ModelParallelStrategy(
        data_parallel_size=world // tp,
        tensor_parallel_size=tp,
        save_distributed_checkpoint=not name.endswith("_full"),
        timeout=LONGEST,
    )


class Sharded(pl.LightningModule):
    """Train with plain AdamW in two groups of unnamed parameters and record the betas of every step.

    Args:
        way: "automatic", "manual" (calls ``self.clip_gradients``), "override" (overrides
            ``configure_gradient_clipping`` and clips by norm), or "value" (the same, by value).
        optimizer: "adamw", "factory" (am_adamw), "flat" (one group of the parameters of the strategy's model), or
            "amsgrad".
    """

    def __init__(
        self,
        placed: str,
        dtype: torch.dtype,
        *,
        scope: str,
        way: str,
        optimizer: str,
        clip: float | None,
        pieces: int,
        bad: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.placed, self.dtype_, self.way, self.kind, self.clip = placed, dtype, way, optimizer, clip
        self.pieces, self.rate, self.bad = pieces, RATES["adamw"][scope], bad
        self.net = make_net(dtype)
        self.automatic_optimization = way != "manual"
        self.seen: list[dict[str, float]] = []

    def configure_model(self) -> None:
        if self.placed == "fsdp1_inside" and not isinstance(self.net, FSDP):
            self.net = on_cpu(FSDP, self.net, auto_wrap_policy=ModuleWrapPolicy({Block}), use_orig_params=True)
        if self.device_mesh is not None and not hasattr(self, "is_sharded"):
            if "tp" in self.placed:
                tensor_parallel(self.net, self.device_mesh["tensor_parallel"])
            if "fsdp2" in self.placed:
                shard(self.net, mesh=self.device_mesh["data_parallel"])
            self.is_sharded = True

    def share(self) -> tuple[int, int]:
        """Return this rank's index among the ranks that see other data, and the number of these ranks."""
        if self.device_mesh is not None:
            return self.device_mesh["data_parallel"].get_local_rank(), self.device_mesh["data_parallel"].size()
        return self.trainer.global_rank, self.trainer.world_size

    def configure_optimizers(self) -> Any:
        return optimizer_and_schedule(self.kind, self.rate, self, self.trainer.model)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        step = self.trainer.global_step  # not batch_idx alone: a resumed Trainer starts its loader again
        x, y = batch_of(step * self.pieces + batch_idx % self.pieces, self.dtype_)
        index, of = self.share()
        x, y = (part.chunk(of)[index].to(self.device) for part in (x, y))
        dtype = next(self.net.parameters()).dtype
        loss = F.mse_loss(self.net(x.to(dtype)), y.to(dtype))
        if step in self.bad and self.trainer.global_rank == 1:
            loss = loss * float("nan")
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.clip is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
        optimizer.step()
        self.lr_schedulers().step()
        return None

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **options: Any) -> None:
        if self.way == "override":
            self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
        elif self.way == "value":
            self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="value")
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, **options)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.arange(100), batch_size=None)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.pieces == 0:
            momentum = getattr(self.trainer.optimizers[0], "momentum", dict)
            self.seen.append({name: float(beta) for name, beta in momentum().items()})


def optimizer_and_schedule(kind: str, rate: float, net: torch.nn.Module, model: torch.nn.Module) -> Any:
    """Build them. ``model`` is ``net`` as the strategy wrapped it, with flat parameters under FSDP1."""
    if kind == "factory":
        optimizer: Any = am_adamw(net, lr=rate, weight_decay=0.1, betas=(0.89, 0.95))
    elif kind in ("flat", "amsgrad"):
        amsgrad = kind == "amsgrad"
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, amsgrad=amsgrad)
    else:
        named = list(net.named_parameters())
        decayed = [p for n, p in named if is_plain_decay(n)]
        groups = [
            {"params": decayed, "weight_decay": 0.1},
            {"params": [p for n, p in named if not is_plain_decay(n)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    schedule = LambdaLR(optimizer, lambda step: lr_of(step, 1.0))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Memory(Logger):
    """Keep what is logged, on every rank."""

    name, version = "memory", 0

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **options: Any) -> None:
        pass


class Watch(pl.Callback):
    """Count all-reduces called from Python in training (FSDP's and DDP's own are other calls); gather the weights."""

    def __init__(self) -> None:
        self.calls = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.original = original = dist.all_reduce

        def counted(*args: Any, **options: Any) -> Any:
            self.calls += 1
            return original(*args, **options)

        dist.all_reduce = counted

    def on_train_end(self, trainer: pl.Trainer, pl_module: Sharded) -> None:
        dist.all_reduce = self.original
        outside = isinstance(trainer.strategy.model, FSDP)
        model = trainer.strategy.model if outside else pl_module.net
        self.weights = {name.removeprefix("net."): w for name, w in whole_weights(model).items()}

    def on_exception(self, trainer: pl.Trainer, pl_module: Sharded, exception: BaseException) -> None:
        dist.all_reduce = getattr(self, "original", dist.all_reduce)


def run(
    placed: str,
    *,
    world: int = 1,
    scope: str = "tensor",
    dtype: torch.dtype = torch.float64,
    steps: int = STEPS,
    adaptive: bool = True,
    way: str = "automatic",
    optimizer: str = "adamw",
    clip: float | None = None,
    pieces: int = 1,
    bad: tuple[int, ...] = (),
    of_callback: dict[str, Any] | None = None,
    others: tuple[pl.Callback, ...] = (),
    resume: str | None = None,
    save: str | None = None,
    **options: Any,
) -> tuple[pl.Trainer, Sharded, Watch, list[dict[str, float]], list[list[float]]]:
    """Fit on all ranks of the pool, or without a pool on ``world`` processes that Lightning launches.

    Args:
        clip: the largest norm, or the largest value if ``way`` is "value".
        pieces: number of micro-batches of a step.
        bad: steps in which rank 1 has a NaN loss.
        resume, save: paths of the checkpoints to read and to write. Default: none.
        options: options of the Trainer.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    plugins: list[Any] = [Wide()] if "fsdp1" in placed and dtype == torch.float64 else []
    if dist.is_initialized():
        world = dist.get_world_size()
        os.environ["LOCAL_RANK"] = str(dist.get_rank())  # as after a launch, so that Lightning starts no processes
        plugins.append(LightningEnvironment())
    module = Sharded(placed, dtype, scope=scope, way=way, optimizer=optimizer, clip=clip, pieces=pieces, bad=bad)
    watch, memory = Watch(), Memory()
    clipped = {"gradient_clip_val": clip} if way == "automatic" and clip is not None else {}
    trainer = pl.Trainer(
        **quiet(
            devices=world,
            strategy=strategy_of(placed, world),
            plugins=plugins,
            max_steps=steps,
            accumulate_grad_batches=pieces,
            logger=memory,
            log_every_n_steps=1,
            callbacks=[*([AdaptiveMemory(scope=scope, **(of_callback or {}))] if adaptive else []), watch, *others],
            **clipped,
            **options,
        )
    )
    with raw_betas(scope) if adaptive else nullcontext([]) as raw:
        trainer.fit(module, ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return trainer, module, watch, memory.logged, raw


def alone(
    *,
    scope: str = "tensor",
    dtype: torch.dtype = torch.float64,
    steps: int = STEPS,
    way: str = "automatic",
    optimizer: str = "adamw",
    clip: float | None = None,
    pieces: int = 1,
) -> dict[str, Any]:
    """Make the same run in one process, in a plain loop with torch's own clipping, without Lightning or a wrapper."""
    net, rate = make_net(dtype), RATES["adamw"][scope]
    made = optimizer_and_schedule(optimizer, rate, net, net)
    ours = made["optimizer"]
    if optimizer != "factory":
        groups = [{**group, "betas": (0.89, 0.95)} for group in ours.param_groups]
        ours = AMAdamW([{k: g[k] for k in ("params", "lr", "betas", "weight_decay")} for g in groups], scope=scope)
    ours.bind_model(net)
    seen, norms = [], []
    with raw_betas(scope) as raw:
        for step in range(steps):
            for group in ours.param_groups:
                group["lr"] = rate * lr_of(step, 1.0)
            ours.zero_grad()
            for piece in range(pieces):
                x, y = batch_of(step * pieces + piece, dtype)
                (F.mse_loss(net(x), y) / pieces).backward()
            if way == "value":
                torch.nn.utils.clip_grad_value_(net.parameters(), clip)
            elif clip is not None:
                norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), clip)))
            ours.step()
            seen.append({name: float(beta) for name, beta in ours.momentum().items()})
    names = ours.parameter_names()
    by_name = [dict(zip(names, row, strict=True)) for row in raw]
    return {"seen": seen, "raw": by_name, "norms": norms, "weights": dict(net.named_parameters())}


def fit(placed: str, dtype: torch.dtype = torch.float64, **how: Any) -> dict[str, Any]:
    """Fit, and compare with :func:`alone`.

    Returns the largest relative errors, the bits that all ranks must share, and what was logged.
    """
    trainer, module, watch, logged, raw = run(placed, dtype=dtype, **how)
    (optimizer,) = trainer.optimizers
    single = alone(dtype=dtype, **{key: value for key, value in how.items() if key not in ("world", "precision")})
    return {
        "kind": type(optimizer).__name__,
        **compared(optimizer, module, watch, raw, single),
        "all_reduces": watch.calls,
        "norms": [entry["am/grad_norm"] for entry in logged if "am/grad_norm" in entry],
        "expected_norms": single["norms"],
        "dtypes": {str(value.dtype) for state in optimizer.state.values() for value in state.values()},
        "betas_logged": sum("am/beta/mean" in entry for entry in logged),
    }


def compared(optimizer: Any, module: Sharded, watch: Watch, raw: Any, single: dict[str, Any]) -> dict[str, Any]:
    """Compare the last ``len(raw)`` steps of a run with those of the run in one process."""
    names = [name.removeprefix("net.") for name in optimizer.parameter_names()]
    seen = [{name.removeprefix("net."): beta for name, beta in step.items()} for step in module.seen]
    errors = [
        abs(beta - theirs[name]) / (abs(theirs[name]) + 0.1)
        for ours, theirs in beside(raw, names, seen, single | {"raw": single["raw"][-len(raw) :]})
        for name, beta in ours.items()
        if beta == beta or theirs[name] == theirs[name]
    ]
    off = [float((watch.weights[n] - w).abs().max() / w.abs().max()) for n, w in single["weights"].items()]
    betas = [beta for step in module.seen[-len(raw) :][1:] for beta in step.values()]
    return {
        "raw": max(errors),
        "weights": max(off),
        "bits": [{name: beta.hex() for name, beta in step.items()} for step in module.seen],
        "names": set(optimizer.parameter_names()) == {f"net.{name}" for name in single["weights"]},
        "share": sum(1e-6 < beta < 0.89 - 1e-6 for beta in betas) / len(betas),
    }
