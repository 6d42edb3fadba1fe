"""Pretrain a Llama with Accelerate: the same recipes as pretrain.py, as a loop to read and to edit.

    accelerate launch pretrain_accelerate.py --config laptop [--KEY VALUE ...]
    torchrun --nproc-per-node 2 pretrain_accelerate.py --config laptop --trainer.accelerator cpu

One process, DDP, FSDP2 and DeepSpeed come from the launcher (launch/accelerate/, configs/deepspeed/); sizes, data,
optimizer, schedule and folders from the recipe. Of its `trainer` section this program uses max_steps,
accumulate_grad_batches, gradient_clip_val, precision, val_check_interval, log_every_n_steps and default_root_dir.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin, set_seed, tqdm
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from am_lightning import AMSGD, AMAdamW
from am_lightning.huggingface import attach
from am_lightning.pretrain.checkpoints.accelerate import AccelerateCheckpoints, hold_together
from am_lightning.pretrain.commands.report.summary import next_commands
from am_lightning.pretrain.data.text_data import TextData
from am_lightning.pretrain.model.network import build_llama, token_loss
from am_lightning.pretrain.runtime.collective_errors import Agreement, leave_group
from am_lightning.pretrain.runtime.errors import RecipeError, require
from am_lightning.pretrain.runtime.main import command_line
from am_lightning.pretrain.runtime.operator_build import announce_deepspeed_build
from am_lightning.pretrain.runtime.run_config import RunConfig, read_run_config
from am_lightning.pretrain.runtime.stop_signals import StopSignals

PRECISIONS = {"32-true": "no", "bf16-mixed": "bf16", "16-mixed": "fp16"}


def main(args: list[str] | None = None) -> None:
    """Run the command line `args` (sys.argv's where None)."""
    with command_line():
        train(read_run_config(args))


class Progress:
    """Optimizer steps that are done; saved and loaded with the rest of the state."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def train(settings: RunConfig) -> None:
    stop = StopSignals()
    stop.take()
    accelerator = make_accelerator(settings)
    data = open_data(accelerator, settings)
    model, optimizer, schedule, states = make_model(accelerator, settings)

    progress = Progress()
    states |= {"progress": progress, "data": data}
    checkpoints = AccelerateCheckpoints(accelerator, settings.checkpoints, settings.keep, states, settings.shape)
    if settings.ckpt_path is not None:
        loaded = checkpoints.load(settings.ckpt_path)
        accelerator.print(f"going on from {loaded}" if loaded else "no checkpoint yet: starting from step 0")

    ranks = share_of(accelerator)
    batches = data.train_loader(steps=settings.steps, accumulate=settings.accumulate, first_step=progress.step, **ranks)
    agreement = Agreement(accelerator.device, accelerator.num_processes)
    bar = tqdm(total=settings.steps, initial=progress.step, disable=not settings.progress_bar, unit="step")
    step_loss = torch.zeros((), device=accelerator.device)
    model.train()
    stopped, stop.later = False, True
    for batch in batches:
        batch = batch.to(accelerator.device, non_blocking=True)
        with accelerator.accumulate(model):
            loss = token_loss(model(input_ids=batch).logits, batch)
            step_loss += loss.detach() / settings.accumulate
            accelerator.backward(loss)
            if accelerator.sync_gradients and settings.clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        learning_rate = schedule.get_last_lr()[0]
        schedule.step()
        progress.step += 1
        bar.update()
        step, last = progress.step, progress.step == settings.steps
        if is_due(step, settings.log_every):
            mean = float(accelerator.reduce(step_loss, reduction="mean"))
            accelerator.log({"train/loss": mean, "lr": learning_rate}, step=step)
            bar.set_postfix_str(f"loss {mean:.3f}")
        step_loss.zero_()
        if is_due(step, settings.validate_every):
            validate(accelerator, model, data.val_loader(rows=data.val_rows, **ranks), "val/", step)
        stopped = agreement.ask(1 if stop.received else 0) > 0  # on GPUs the answer is that of the step before
        if stopped or last or is_due(step, settings.save_every):
            checkpoints.save(step)
        if stopped:
            break

    bar.close()
    if agreement.ask(1 if stop.received else 0, now=True) or stopped:  # also a signal in the last step
        leave_group()
        stop.leave(progress.step)
    stop.later = False
    rows = data.val_loader(rows=data.final_val_rows, **ranks)
    loss = validate(accelerator, model, rows, "final/val_", progress.step)
    finish(accelerator, settings, loss, checkpoints.newest())


def finish(accelerator: Accelerator, settings: RunConfig, loss: torch.Tensor, checkpoint: Path | None) -> None:
    """Print what there is now, and leave the other processes."""
    rows = settings.data.scored_rows
    accelerator.print(
        f"\n  validation loss  {loss:.4f} nats per token (perplexity {loss.exp():.2f}) on {rows} held-out rows"
        f'\n  curves           tensorboard --logdir "{settings.root / "logs"}"\n'
        f"  checkpoint       {checkpoint}\n  next             {next_commands(settings.root)}\n"
    )
    leave_group()
    accelerator.end_training()


def open_data(accelerator: Accelerator, settings: RunConfig) -> TextData:
    """Its shards are made by one process of each machine, where they are not there yet."""
    with accelerator.local_main_process_first():
        if accelerator.is_local_main_process:
            settings.data.prepare()
    settings.data.open()
    return settings.data


def share_of(accelerator: Accelerator) -> dict[str, Any]:
    """Arguments of the loaders: whose rows they are; pinned, a GPU copies them without the host's waiting."""
    pinned = accelerator.device.type == "cuda"
    return {"rank": accelerator.process_index, "world_size": accelerator.num_processes, "pin_memory": pinned}


def make_model(
    accelerator: Accelerator, settings: RunConfig
) -> tuple[nn.Module, Optimizer, LRScheduler, dict[str, Stateful]]:
    """Prepared, all but the schedule: Accelerate would step it once for each process. And the states that a checkpoint
    holds beside those of the model and the optimizer."""
    set_seed(settings.seed)
    model = build_llama(settings.shape)
    optimizer = settings.make_optimizer(model)
    schedule = settings.make_schedule(optimizer)
    adaptive = isinstance(optimizer, AMAdamW | AMSGD)
    model, optimizer = accelerator.prepare(model, optimizer)
    states: dict[str, Stateful] = {"schedule": schedule}
    if adaptive:
        states["momentum"] = attach(accelerator, optimizer, log_every_n_steps=settings.log_every)
    return model, optimizer, schedule, states


def is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def make_accelerator(settings: RunConfig) -> Accelerator:
    """With TensorBoard curves in DIR/logs, and under DeepSpeed the recipe's sizes in its configuration."""
    require(settings.precision in PRECISIONS, "trainer.precision", settings.precision, " or ".join(PRECISIONS))
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        announce_deepspeed_build()
    accelerator = Accelerator(
        # As a plugin: the launcher's ACCELERATE_GRADIENT_ACCUMULATION_STEPS ("auto" with DeepSpeed) is not read then.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.accumulate),
        mixed_precision=PRECISIONS[settings.precision],
        log_with="tensorboard",
        project_dir=settings.root,
        **processes(settings),
    )
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise RecipeError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and Accelerate sees {accelerator.num_processes} process"
        )
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        rows = settings.data.batch_size // (accelerator.num_processes * settings.accumulate)
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": rows,
            "gradient_accumulation_steps": settings.accumulate,
            "gradient_clipping": settings.clip or 0.0,
        }
    hold_together(accelerator, settings.checkpoints)
    accelerator.init_trackers("logs")
    if accelerator.is_main_process:
        settings.save(settings.root / "logs" / "config.yaml")
    return accelerator


def processes(settings: RunConfig) -> dict[str, Any]:
    """Arguments of Accelerator: how long processes wait for each other; where there is no GPU or none is wanted, they
    find each other by gloo."""
    on_cpu = settings.accelerator == "cpu" or not torch.accelerator.is_available()
    timeout = None if settings.hang_timeout_s is None else timedelta(seconds=settings.hang_timeout_s)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1  # one process has no group, and Accelerate would look for one
    group = InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=timeout)
    handlers = [group] if several and (on_cpu or timeout is not None) else []
    # Accelerate forgets DeepSpeed where it is told cpu=True.
    cpu = on_cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true"
    return {"cpu": cpu, "kwargs_handlers": handlers}


@torch.no_grad()
def validate(accelerator: Accelerator, model: nn.Module, batches: Any, tag: str, step: int) -> torch.Tensor:
    """Mean loss over the rows of all processes; logged as `tag`loss, with its perplexity."""
    model.eval()
    total = torch.zeros(2, device=accelerator.device)
    for batch in batches:
        batch = batch.to(accelerator.device, non_blocking=True)
        loss = token_loss(model(input_ids=batch).logits, batch)
        total += torch.stack([loss * len(batch), torch.full_like(loss, len(batch))])
    model.train()
    total = accelerator.reduce(total)
    loss = total[0] / total[1]
    accelerator.log({f"{tag}loss": float(loss), f"{tag}perplexity": float(loss.exp())}, step=step)
    return loss


if __name__ == "__main__":
    main()
