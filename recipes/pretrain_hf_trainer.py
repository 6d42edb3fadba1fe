"""Pretrain a Llama with transformers' Trainer: the same recipes as pretrain.py, the same rows in the same order.

    accelerate launch pretrain_hf_trainer.py --config laptop [--KEY VALUE ...]
    torchrun --nproc-per-node 2 pretrain_hf_trainer.py --config laptop --trainer.accelerator cpu

training_arguments() turns the recipe's `trainer` section into TrainingArguments. Checkpoints are folders `checkpoint-N`
in the recipe's checkpoint folder.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import set_seed

from am_lightning import AMSGD, AMAdamW
from am_lightning.huggingface import AdaptiveMemoryCallback
from am_lightning.pretrain.checkpoints.accelerate import CheckpointFolders
from am_lightning.pretrain.checkpoints.run_folder import TRAINER_STEPS
from am_lightning.pretrain.model.network import build_llama, token_loss
from am_lightning.pretrain.runtime.collectives import Agreement, limit_waits
from am_lightning.pretrain.runtime.main import command_line
from am_lightning.pretrain.runtime.run_config import RunConfig, read_run_config
from am_lightning.pretrain.runtime.stop_signals import StopSignals

CURVES = {"loss": "train/loss", "learning_rate": "lr", "grad_norm": "grad_norm", "eval_loss": "val/loss"}


def main(args: list[str] | None = None) -> None:
    """Run the command line `args`; default: sys.argv's."""
    with command_line():
        train(read_run_config(args))


class RecipeTrainer(Trainer):
    """Trainer whose rows, loss, optimizer and schedule are the recipe's."""

    def __init__(self, settings: RunConfig, checkpoints: CheckpointFolders, **options: Any) -> None:
        self.settings, self.checkpoints = settings, checkpoints
        super().__init__(eval_dataset=[], **options)  # see get_eval_dataloader
        self.model_accepts_loss_kwargs = False  # compute_loss gives the mean of a micro-batch

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader that Accelerate does not prepare, because it gives each process its own rows."""
        return self.loader(
            self.settings.data.train_loader,
            steps=self.settings.steps,
            accumulate=self.settings.accumulate,
            first_step=lambda: self.state.global_step,
            pin_memory=self.args.device.type == "cuda",
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        data = self.settings.data
        return self.loader(data.val_loader, rows=data.val_rows if self.is_in_train else data.final_val_rows)

    def loader(self, make: Callable[..., DataLoader], **options: Any) -> DataLoader:
        loader = make(rank=self.args.process_index, world_size=self.args.world_size, **options)
        loader.collate_fn = as_inputs
        return loader

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **options: Any) -> Tensor:
        """Copy the rows from pinned memory, so that the host does not wait for it."""
        rows = inputs["input_ids"].to(self.args.device, non_blocking=True)
        return super().training_step(model, dict.fromkeys(inputs, rows), *args, **options)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **options: Any
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        loss = token_loss(outputs.logits, inputs["input_ids"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        super().log(logs, *args, **options)
        if "loss" in logs:
            self.settings.check_step(self.optimizer, self.state.global_step, logs["loss"])

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        """Move the Trainer's folder to its place when all processes have written it."""
        with self.checkpoints.writing(f"checkpoint-{self.state.global_step}") as part:
            super()._save_checkpoint(*args, **options)
            if self.args.should_save and not (part / "trainer_state.json").exists():
                raise RuntimeError(f"this version of transformers does not write a checkpoint into {part}")

    def _get_output_dir(self, *args: Any, **options: Any) -> str:
        return str(self.checkpoints.part)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.settings.make_optimizer(self.model if model is None else model)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = self.settings.make_schedule(optimizer or self.optimizer)
        return self.lr_scheduler


def as_inputs(rows: list[Tensor] | Tensor) -> dict[str, Tensor]:
    """Return rows of tokens, or a batch of them, as the Trainer's inputs."""
    batch = rows if isinstance(rows, Tensor) else default_collate(rows)
    return {"input_ids": batch, "labels": batch}


class Logs(TrainerCallback):
    """Writes the configuration, and the Trainer's logs to TensorBoard under the names that the other programs use."""

    def __init__(self, settings: RunConfig) -> None:
        self.settings, self.folder = settings, settings.root / "logs"
        self.writer: SummaryWriter | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the configuration after a checkpoint is loaded, because a refused resume must not change it.

        The Trainer takes the intervals of saving, logging and validating from the checkpoint; they are set back.
        """
        state.compute_steps(args, state.max_steps)
        if state.is_world_process_zero:
            self.settings.save(self.folder / "config.yaml")
            self.writer = SummaryWriter(str(self.folder))

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.writer is None or logs is None:
            return
        for key, value in logs.items():
            if key in CURVES or key.startswith("am/"):
                self.writer.add_scalar(CURVES.get(key, key), value, state.global_step)
        if "eval_loss" in logs:
            perplexity = torch.tensor(logs["eval_loss"]).exp()  # inf, where math.exp raises an error
            self.writer.add_scalar("val/perplexity", perplexity, state.global_step)
        self.writer.flush()


class StopAtStep(TrainerCallback):
    """Saves and stops at the end of the step in which any process receives a signal; on several GPUs one step later."""

    def __init__(self, stop: StopSignals, args: TrainingArguments) -> None:
        self.stop, self.agreement = stop, Agreement(args.device, args.world_size)
        self.stopped = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.stop.later = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.agreement.ask(1 if self.stop.received else 0):
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop also after a signal in the last step, which is saved."""
        self.stopped = self.agreement.ask(1 if self.stop.received else 0, now=True) > 0 or self.stopped
        self.stop.later = self.stopped


def train(settings: RunConfig) -> None:
    stop = StopSignals()
    stop.take()
    args = training_arguments(settings)
    limit_waits(settings.hang_timeout_s)  # ddp_timeout does not reach gloo's group
    settings.open_data()

    set_seed(settings.seed)
    model = build_llama(settings.shape)
    identity = {"shape": settings.shape, "data": settings.data}
    checkpoints = CheckpointFolders(settings.checkpoints, TRAINER_STEPS, "data.pt", settings.keep, identity)
    stopping = StopAtStep(stop, args)
    callbacks = [Logs(settings), stopping]
    if isinstance(settings.check_optimizer(), AMAdamW | AMSGD):
        callbacks.append(AdaptiveMemoryCallback())
    trainer = RecipeTrainer(settings, checkpoints, model=model, args=args, callbacks=callbacks)
    checkpoints.take(settings.root, settings.ckpt_path)
    resume = None if settings.ckpt_path is None else checkpoints.choose(settings.ckpt_path)[0]
    for name in ("transformers.trainer", "transformers.trainer_utils"):  # they warn of intervals that Logs sets back
        logging.getLogger(name).addFilter(lambda record: "the `trainer_state.json` within" not in record.getMessage())
    trainer.train(resume_from_checkpoint=resume and str(resume))

    if stopping.stopped:
        stop.leave(trainer.state.global_step)
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        settings.print_result(loss, checkpoints.newest())


def training_arguments(settings: RunConfig) -> TrainingArguments:
    """Return the recipe's `trainer` section as TrainingArguments."""
    mixed_precision = settings.mixed_precision()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return TrainingArguments(
        output_dir=str(settings.checkpoints),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.data.batch_size // (settings.accumulate * world_size),
        per_device_eval_batch_size=settings.data.val_batch_size,
        gradient_accumulation_steps=settings.accumulate,
        max_grad_norm=settings.clip or 0.0,
        bf16=mixed_precision == "bf16",
        fp16=mixed_precision == "fp16",
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="no" if settings.validate_every is None else "steps",
        eval_steps=settings.validate_every,
        prediction_loss_only=True,
        save_strategy="no" if settings.save_every is None else "steps",
        save_steps=settings.save_every or 1,
        save_total_limit=None,  # CheckpointFolders removes them; the Trainer would go by the times of files
        seed=settings.seed,
        ignore_data_skip=True,  # the loader begins at the right step
        report_to="none",  # Logs writes them
        disable_tqdm=not settings.progress_bar,
        ddp_find_unused_parameters=False,
        ddp_timeout=math.ceil(settings.hang_timeout_s or 1800),  # seconds; 1800 is the Trainer's default
        ddp_backend="gloo" if settings.on_cpu and world_size > 1 else None,  # one process has no group
        use_cpu=settings.on_cpu,
    )


if __name__ == "__main__":
    main()
