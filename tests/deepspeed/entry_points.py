"""Functions that each rank runs for the frameworks' own entry points to DeepSpeed, beside one float64 process."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning.fabric import Fabric
from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy as FabricDeepSpeedStrategy
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from am_lightning import AdaptiveMemory, AMAdamW, am_adamw
from am_lightning.huggingface import attach as attach_accelerator
from am_lightning.lightning import attach as attach_fabric
from am_lightning.optim.unwrap import unwrap_optimizer
from tests.deepspeed.runs import CLIP, RATES, alone, batch_of, config_of, groups_of, make_net, schedule, whole_weights
from tests.huggingface.events import histograms_in, scalars_in
from tests.huggingface.trainer_runs import FORMS, Watch, make_trainer
from tests.lightning.model import quiet
from tests.loggers.planted import Planted

STEPS, EVERY = 6, 2  # ZeRO makes each step in several calls


class CPU:
    """An accelerator with what both DeepSpeed strategies ask for."""

    def _get_process_group_backend(self) -> str:
        return "gloo"

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # its index is read


class OnCPU(CPU, DeepSpeedStrategy):
    """DeepSpeedStrategy without its two checks for CUDA."""

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class FabricOnCPU(CPU, FabricDeepSpeedStrategy):
    """The same strategy for Fabric."""

    setup_environment = FabricDeepSpeedStrategy.__mro__[1].setup_environment

    def _setup_distributed(self) -> None:
        self._set_world_ranks()
        self._init_deepspeed_distributed()


class Module(pl.LightningModule):
    """Train with plain AdamW in two groups and a schedule, and record the betas of every step."""

    def __init__(self, scope: str) -> None:
        super().__init__()
        self.net, self.scope, self.seen = make_net().float(), scope, []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(groups_of(self.net, self.scope), betas=(0.9, 0.999))
        jump = LambdaLR(optimizer, lambda step: (1.0 - 0.05 * step) * (2.0 if step % 2 else 1.0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": jump, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch_of(self.trainer.global_step, 0, self.trainer.global_rank, self.trainer.world_size)
        return (self.net(x.float()) - y.float()).square().mean()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.arange(100), batch_size=None)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        optimizer = self.trainer.optimizers[0]
        momentum = getattr(optimizer, "optimizer", optimizer).momentum()
        self.seen.append({name.removeprefix("net."): float(beta) for name, beta in momentum.items()})


def zero_config(stage: int) -> dict[str, Any]:
    config = config_of(stage)
    for key in ("gradient_clipping", "gradient_accumulation_steps"):  # set by the Trainer
        del config[key]
    for key in ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"):  # set by the callback
        del config[key]
    return config


def lightning(folder: str, stage: int, scope: str = "tensor", offload: bool = False) -> dict[str, Any]:
    """Make a whole fit, then one that is saved half way and resumed."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logger = TensorBoardLogger(folder, name="", version="curves")
    unbroken = _fit(folder, stage, scope, STEPS, logger, offload=offload)
    path = os.path.join(folder, "half.ckpt")
    _fit(folder, stage, scope, STEPS // 2, False, save=path, offload=offload)
    resumed = _fit(folder, stage, scope, STEPS, False, resume=path, offload=offload)
    single = alone(scope, steps=STEPS)
    dist.barrier()
    return {
        **_errors(unbroken, single),
        "resumed": _errors(resumed, {**single, "seen": single["seen"][STEPS // 2 :]}),
        "bits": [{n: b.hex() for n, b in step.items()} for step in unbroken["seen"]],
        "scalars": scalars_in(Path(folder) / "curves"),
        "histograms": histograms_in(Path(folder) / "curves"),
    }


def _fit(
    folder: str,
    stage: int,
    scope: str,
    steps: int,
    logger: Any,
    *,
    save: str | None = None,
    resume: str | None = None,
    offload: bool = False,
) -> dict[str, Any]:
    config = zero_config(stage)
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    module = Module(scope)
    trainer = pl.Trainer(
        **quiet(
            devices=dist.get_world_size(),
            strategy=OnCPU(config=config),
            plugins=[LightningEnvironment()],
            max_steps=steps,
            gradient_clip_val=CLIP,
            logger=logger,
            log_every_n_steps=EVERY,
            callbacks=[AdaptiveMemory(scope=scope, beta1_max=0.89)],
            default_root_dir=folder,
        )
    )
    trainer.fit(module, ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    weights = whole_weights(trainer.strategy.model, stage, "float32")
    return {"seen": module.seen, "weights": {n.partition("net.")[2]: w for n, w in weights.items()}}


def _errors(run: dict[str, Any], single: dict[str, Any]) -> dict[str, float]:
    pairs = list(zip(run["seen"], single["seen"], strict=True))
    return {
        "beta": max(abs(ours[n] - b) for ours, theirs in pairs for n, b in theirs.items()),
        "weights": max(float((run["weights"][n] - w).abs().max()) for n, w in single["weights"].items()),
    }


def accelerate(folder: str, stage: int, scope: str = "tensor") -> dict[str, Any]:
    """Use Accelerate's plugin, attach, save_state and load_state."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    try:
        plugin = DeepSpeedPlugin(hf_ds_config=config_of(stage))
        accelerator = Accelerator(
            deepspeed_plugin=plugin,
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
            log_with="tensorboard",
            project_dir=folder,
        )
        accelerator.init_trackers("curves")
        net = make_net().float()
        optimizer = am_adamw(net, lr=1.0, betas=(0.89, 0.999), scope=scope)
        for group, given in zip(optimizer.param_groups, groups_of(net, scope), strict=True):
            group.update({key: given[key] for key in ("lr", "weight_decay")})
        model, wrapped = accelerator.prepare(net, optimizer)
        attach_accelerator(accelerator, wrapped, log_every_n_steps=EVERY)
        seen = []
        for step in range(STEPS):
            if step == STEPS // 2:
                accelerator.save_state(os.path.join(folder, "state"))
                accelerator.load_state(os.path.join(folder, "state"))
            schedule(optimizer, step, scope)
            x, y = batch_of(step, 0, dist.get_rank(), dist.get_world_size())
            accelerator.backward((model(x.float()) - y.float()).square().mean())
            wrapped.step()
            wrapped.zero_grad()
            seen.append({name: float(beta) for name, beta in optimizer.momentum().items()})
        for tracker in accelerator.trackers:  # end_training() would end the process group
            tracker.finish()
        run = {"seen": seen, "weights": whole_weights(model, stage, "float32")}
        single = alone(scope, steps=STEPS)
        dist.barrier()
        return {
            **_errors(run, single),
            "bits": [{n: b.hex() for n, b in step.items()} for step in seen],
            "scalars": scalars_in(Path(folder)),
        }
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def _fabric_on_cpu(folder: str, **config: Any) -> Fabric:
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    runner = Fabric(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=FabricOnCPU(config=config_of(**config)),
        plugins=[LightningEnvironment()],
        loggers=TensorBoardLogger(folder, name="", version="curves"),
    )
    runner.launch()
    return runner


def planted(folder: str, stage: int, steps: int, every: int) -> dict[str, dict[int, float]]:
    """Return the curves of a known beta_t; the gradients are those of one process, whose state is not partitioned."""
    runner = _fabric_on_cpu(folder, stage=stage, clip=0.0)
    alone, net = Planted(), Planted().float()
    theirs, own = (AMAdamW(part.named_parameters(), lr=0.01, weight_decay=0.0) for part in (alone, net))
    model, wrapped = runner.setup(net, own)
    attach_fabric(runner, model, wrapped, log_every_n_steps=every)
    for _ in range(steps):
        theirs.zero_grad()
        alone.loss(theirs).backward()
        grads = [param.grad.float() for param in alone.parameters()]
        pairs = zip(net.parameters(), grads, strict=True)
        runner.backward(torch.stack([(param * grad).sum() for param, grad in pairs]).sum(), model=model)
        wrapped.step()
        wrapped.zero_grad()
        theirs.step()
    runner.loggers[0].experiment.flush()
    dist.barrier()
    return scalars_in(Path(folder))


def fabric(folder: str, stage: int, scope: str = "tensor") -> dict[str, Any]:
    """Use Fabric's setup and attach."""
    runner = _fabric_on_cpu(folder, stage=stage)
    net = make_net().float()
    optimizer = am_adamw(net, lr=1.0, betas=(0.89, 0.999), scope=scope)
    for group, given in zip(optimizer.param_groups, groups_of(net, scope), strict=True):
        group.update({key: given[key] for key in ("lr", "weight_decay")})
    model, wrapped = runner.setup(net, optimizer)
    attach_fabric(runner, model, wrapped, log_every_n_steps=EVERY)
    seen = []
    for step in range(STEPS):
        schedule(optimizer, step, scope)
        x, y = batch_of(step, 0, dist.get_rank(), dist.get_world_size())
        runner.backward((model(x.float()) - y.float()).square().mean())
        wrapped.step()
        wrapped.zero_grad()
        seen.append({name: float(beta) for name, beta in optimizer.momentum().items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in runner.loggers:
            logger.finalize("success")
    run = {"seen": seen, "weights": whole_weights(model._forward_module, stage, "float32")}
    single = alone(scope, steps=STEPS)
    dist.barrier()
    return {
        **_errors(run, single),
        "bits": [{n: b.hex() for n, b in step.items()} for step in seen],
        "scalars": scalars_in(Path(folder)),
    }


def named_in_config(stage: int) -> str:
    """Name an optimizer in the DeepSpeed configuration of Lightning."""
    config = zero_config(stage)
    config["optimizer"] = {"type": "AdamW", "params": {"lr": RATES["tensor"][0]}}
    trainer = pl.Trainer(
        **quiet(
            devices=dist.get_world_size(),
            strategy=OnCPU(config=config),
            plugins=[LightningEnvironment()],
            max_steps=1,
            callbacks=[AdaptiveMemory()],
        )
    )
    try:
        trainer.fit(Module("tensor"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class WatchInside(Watch):
    """Watch the optimizer inside DeepSpeed's optimizer, too."""

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        betas = unwrap_optimizer(optimizer).momentum()
        self.seen.append({name: float(beta) for name, beta in betas.items()})


def trainer(folder: str, stage: int, form: str = "class") -> dict[str, Any]:
    """Run transformers' Trainer with a DeepSpeed configuration, beside the same Trainer under DDP."""
    with_engine = _train(Path(folder) / "deepspeed", form, stage)
    plain = _train(Path(folder) / "ddp", form, None)
    dist.barrier()
    off = [abs(a[n] - b[n]) for a, b in zip(with_engine["seen"], plain["seen"], strict=True) for n in b]
    betas = [b for step in plain["seen"][1:] for b in step.values()]
    return {
        "beta": max(off),
        "share": sum(1e-6 < b < 0.89 - 1e-6 for b in betas) / len(betas),
        "engine": with_engine["engine"],
        "bits": [{n: b.hex() for n, b in step.items()} for step in with_engine["seen"]],
        "scalars": scalars_in(Path(folder) / "deepspeed"),
    }


def _train(folder: Path, form: str, stage: int | None) -> dict[str, Any]:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    arguments: dict[str, Any] = {"max_grad_norm": 0.0, "save_strategy": "no", "ddp_backend": "gloo"}
    if stage is not None:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")  # on a CPU Accelerate finds no backend by itself
        config = {**config_of(stage, clip=0.0), "train_micro_batch_size_per_gpu": 2}
        arguments |= {"deepspeed": config, "accelerator_config": {"use_configured_state": True}, "use_cpu": False}
    try:
        watch = WatchInside()
        made = make_trainer(folder, batch=2, watch=watch, arguments=arguments, optimizer_cls_and_kwargs=FORMS[form])
        made.train()
        return {"seen": watch.seen, "engine": type(made.model_wrapped).__name__}
    finally:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
