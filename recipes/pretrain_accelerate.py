"""Pretrain a Llama with Accelerate: the same recipes as pretrain.py, as a loop to read and to edit.

    accelerate launch pretrain_accelerate.py --config laptop [--KEY VALUE ...]
    torchrun --nproc-per-node 2 pretrain_accelerate.py --config laptop --trainer.accelerator cpu

The launcher chooses one process, DDP, FSDP2 or DeepSpeed (launch/accelerate/, configs/deepspeed/). The recipe gives the
sizes, data, optimizer, schedule and folders. Of its `trainer` section this program uses max_steps,
accumulate_grad_batches, gradient_clip_val, precision, val_check_interval, log_every_n_steps and default_root_dir.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin, set_seed, tqdm
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from am_lightning import AMSGD, AMAdamW
from am_lightning.huggingface import attach
from am_lightning.pretrain.checkpoints.accelerate import AccelerateCheckpoints
from am_lightning.pretrain.model.network import build_llama, token_loss
from am_lightning.pretrain.runtime.collectives import Agreement
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.main import command_line
from am_lightning.pretrain.runtime.operator_build import announce_deepspeed_build
from am_lightning.pretrain.runtime.run_config import RunConfig, read_run_config
from am_lightning.pretrain.runtime.stop_signals import StopSignals


def main(args: list[str] | None = None) -> None:
    """Run the command line `args`; default: sys.argv's."""
    with command_line():
        train(read_run_config(args))


def train(settings: RunConfig) -> None:
    stop = StopSignals()
    stop.take()
    accelerator = make_accelerator(settings)
    data = settings.open_data()
    checkpoints = take_folder(accelerator, settings)
    model, optimizer, schedule = make_model(accelerator, settings, checkpoints)
    resume(accelerator, settings, checkpoints)

    step = schedule.last_epoch  # optimizer steps that are done
    ranks: dict[str, Any] = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    ranks["pin_memory"] = accelerator.device.type == "cuda"  # a GPU copies pinned memory asynchronously
    batches = data.train_loader(steps=settings.steps, accumulate=settings.accumulate, first_step=step, **ranks)
    agreement = Agreement(accelerator.device, accelerator.num_processes)
    bar = tqdm(total=settings.steps, initial=step, disable=not settings.progress_bar, unit="step")
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
        step = schedule.last_epoch
        bar.update()
        if is_due(step, settings.log_every):
            mean = float(accelerator.reduce(step_loss, reduction="mean"))
            accelerator.log({"train/loss": mean, "lr": learning_rate}, step=step)
            bar.set_postfix_str(f"loss {mean:.3f}")
            settings.check_step(optimizer, step, mean)
        step_loss.zero_()
        if is_due(step, settings.validate_every):
            validate(accelerator, model, data.val_loader(rows=data.val_rows, **ranks), "val/", step)
        stopped = agreement.ask(1 if stop.received else 0) > 0  # on GPUs this is the answer of the previous step
        if stopped or step == settings.steps or is_due(step, settings.save_every):
            checkpoints.save(step)
        if stopped:
            break
    bar.close()
    if agreement.ask(1 if stop.received else 0, now=True) or stopped:  # includes a signal in the last step
        stop.leave(step)
    stop.later = False
    rows = data.val_loader(rows=data.final_val_rows, **ranks)
    loss = validate(accelerator, model, rows, "final/val_", step)
    if accelerator.is_main_process:
        settings.print_result(loss, checkpoints.newest())
    accelerator.wait_for_everyone()  # a process that leaves gloo's group early is aborted
    accelerator.end_training()


def take_folder(accelerator: Accelerator, settings: RunConfig) -> AccelerateCheckpoints:
    """Lock the run's folder after all settings are checked, and move an earlier run away unless this one resumes."""
    settings.check_optimizer()
    identity = {"model": settings.shape, "data": settings.data}
    checkpoints = AccelerateCheckpoints(accelerator, settings.checkpoints, settings.keep, identity=identity)
    checkpoints.take(settings.root, settings.ckpt_path)
    accelerator.init_trackers("logs")
    return checkpoints


def resume(accelerator: Accelerator, settings: RunConfig, checkpoints: AccelerateCheckpoints) -> None:
    """Load the checkpoint of --ckpt_path, then write config.yaml, which a resume that is refused must not change."""
    if settings.ckpt_path is not None:
        loaded = checkpoints.load(settings.ckpt_path)
        accelerator.print(f"resuming from {loaded}" if loaded else "no checkpoint yet: starting from step 0")
    if accelerator.is_main_process:
        settings.save(settings.root / "logs" / "config.yaml")


def make_model(
    accelerator: Accelerator, settings: RunConfig, checkpoints: AccelerateCheckpoints
) -> tuple[nn.Module, Optimizer, LRScheduler]:
    """Return the model, its optimizer and schedule, whose states `checkpoints` saves.

    The schedule is not prepared, because Accelerate would step it once for each process.
    """
    set_seed(settings.seed)
    model = build_llama(settings.shape)
    optimizer = settings.make_optimizer(model)
    checkpoints.states["schedule"] = schedule = settings.make_schedule(optimizer)
    adaptive = isinstance(optimizer, AMAdamW | AMSGD)
    model, optimizer = accelerator.prepare(model, optimizer)
    if adaptive:
        checkpoints.states["momentum"] = attach(accelerator, optimizer, log_every_n_steps=settings.log_every)
    return model, optimizer, schedule


def is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def make_accelerator(settings: RunConfig) -> Accelerator:
    """Return an Accelerator that logs to TensorBoard in DIR/logs, with the recipe's sizes for DeepSpeed."""
    processes, deepspeed = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if deepspeed:
        announce_deepspeed_build()
    timeout = None if settings.hang_timeout_s is None else timedelta(seconds=settings.hang_timeout_s)
    group = InitProcessGroupKwargs(backend="gloo" if settings.on_cpu else "nccl", timeout=timeout)
    accelerator = Accelerator(
        # A plugin wins over the launcher's ACCELERATE_GRADIENT_ACCUMULATION_STEPS, which is "auto" with DeepSpeed.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.accumulate),
        mixed_precision=settings.mixed_precision(),
        log_with="tensorboard",
        project_dir=settings.root,
        cpu=settings.on_cpu and not deepspeed,  # Accelerate ignores DeepSpeed if it is True
        # Accelerate would look for the group of a single process.
        kwargs_handlers=[group] if processes > 1 and (settings.on_cpu or timeout) else [],
    )
    if accelerator.num_processes != processes:
        raise RecipeError(f"WORLD_SIZE is {processes}, and Accelerate sees {accelerator.num_processes} process")
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        rows = settings.data.batch_size // (accelerator.num_processes * settings.accumulate)
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": rows,
            "gradient_accumulation_steps": settings.accumulate,
            "gradient_clipping": settings.clip or 0.0,
        }
    return accelerator


@torch.no_grad()
def validate(accelerator: Accelerator, model: nn.Module, batches: Any, tag: str, step: int) -> float:
    """Return the mean loss over the rows of all processes; log it as `tag`loss, with its perplexity."""
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
    return float(loss)


if __name__ == "__main__":
    main()
