"""Pretrain a Llama with transformers' Trainer: the same recipes as pretrain.py, the same rows in the same order.

    accelerate launch pretrain_hf_trainer.py --config laptop [--KEY VALUE ...]
    torchrun --nproc-per-node 2 pretrain_hf_trainer.py --config laptop --trainer.accelerator cpu

training_arguments() turns the recipe's `trainer` section into TrainingArguments. Checkpoints are folders `checkpoint-N`
in the recipe's checkpoint folder.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import set_seed

from am_lightning import AMSGD, AMAdamW
from am_lightning.huggingface import AdaptiveMemoryCallback
from am_lightning.pretrain.checkpoints.accelerate import chosen, hold_together
from am_lightning.pretrain.checkpoints.atomic import prune, publish_folder
from am_lightning.pretrain.checkpoints.run_folder import TRAINER_STEPS
from am_lightning.pretrain.model.network import build_llama, token_loss
from am_lightning.pretrain.runtime.atomic_files import replacing
from am_lightning.pretrain.runtime.collectives import Agreement, limit_waits
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.main import command_line
from am_lightning.pretrain.runtime.run_config import RunConfig, read_run_config
from am_lightning.pretrain.runtime.stop_signals import StopSignals

CURVES = {"loss": "train/loss", "learning_rate": "lr", "grad_norm": "grad_norm", "eval_loss": "val/loss"}
PART = ".checkpoint.part"  # folder of a checkpoint that is not complete
DATA_FILE = "data.pt"  # in each checkpoint: the model's shape and the data it was trained on


def main(args: list[str] | None = None) -> None:
    """Run the command line `args`; default: sys.argv's."""
    with command_line():
        train(read_run_config(args))


class RecipeTrainer(Trainer):
    """Trainer whose rows, loss, optimizer and schedule are the recipe's."""

    def __init__(self, settings: RunConfig, **options: Any) -> None:
        self.settings = settings
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

    def _get_output_dir(self, *args: Any, **options: Any) -> str:
        """Return the folder that the Trainer writes a checkpoint into; WholeCheckpoints moves it to its place."""
        return str(self.settings.checkpoints / PART)

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


class Curves(TrainerCallback):
    """Writes the Trainer's logs to TensorBoard under the names that the other programs use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: SummaryWriter | None = None

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        self.writer = self.writer or SummaryWriter(str(self.folder))
        for key, value in logs.items():
            if key in CURVES or key.startswith("am/"):
                self.writer.add_scalar(CURVES.get(key, key), value, state.global_step)
        if "eval_loss" in logs:
            perplexity = torch.tensor(logs["eval_loss"]).exp()  # inf, where math.exp raises an error
            self.writer.add_scalar("val/perplexity", perplexity, state.global_step)
        self.writer.flush()


class WholeCheckpoints(TrainerCallback):
    """Adds the model's shape, the data and a manifest to every checkpoint, and moves it to its place when it is whole.

    Also refuses a checkpoint of others.
    """

    def __init__(self, settings: RunConfig) -> None:
        self.settings = settings

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the configuration after a checkpoint is loaded, because a refused resume must not change it.

        The Trainer takes the intervals of saving, logging and validating from the checkpoint; they are set back.
        """
        state.compute_steps(args, state.max_steps)
        if state.is_world_process_zero:
            shutil.rmtree(self.settings.checkpoints / PART, ignore_errors=True)  # left by a killed run
            self.settings.save(self.settings.root / "logs" / "config.yaml")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        data = self.settings.data.state_dict()
        PartialState().wait_for_everyone()  # each process writes its own random state
        if state.is_world_process_zero:
            path = self.settings.checkpoints / f"checkpoint-{state.global_step}"
            part = path.parent / PART / path.name
            if not part.is_dir():
                raise RuntimeError(f"this version of transformers does not write a checkpoint into {part.parent}")
            with replacing(part / DATA_FILE, "Free some space, then start again.") as file:
                torch.save({"shape": self.settings.shape.state_dict(), "data": data}, file)
            publish_folder(part, path)
            shutil.rmtree(part.parent, ignore_errors=True)
            prune(path.parent.glob(TRAINER_STEPS), self.settings.keep)
        PartialState().wait_for_everyone()  # before a process begins to write the next one

    def load(self, folder: Path) -> None:
        """Raise a RecipeError if the checkpoint in `folder` is of another program or model, or has other data."""
        if not (folder / DATA_FILE).exists():
            raise RecipeError(f"--ckpt_path {folder} is not a whole checkpoint of this program: it has no {DATA_FILE}")
        found = torch.load(folder / DATA_FILE, weights_only=True)
        self.settings.shape.load_state_dict(found["shape"])
        self.settings.data.load_state_dict(found["data"])


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
    limit_waits(settings.hang_timeout_s if args.world_size > 1 else None)  # ddp_timeout does not reach gloo's group
    with args.main_process_first(desc="token shards"):
        if args.local_process_index == 0:
            settings.data.prepare()
    settings.data.open()

    set_seed(settings.seed)
    model = build_llama(settings.shape)
    checkpoints = WholeCheckpoints(settings)
    stopping = StopAtStep(stop, args)
    callbacks = [Curves(settings.root / "logs"), checkpoints, stopping]
    if isinstance(settings.check_optimizer(), AMAdamW | AMSGD):
        callbacks.append(AdaptiveMemoryCallback())
    trainer = RecipeTrainer(settings, model=model, args=args, callbacks=callbacks)
    hold_together(trainer.accelerator, settings.checkpoints, settings.root, settings.ckpt_path)
    path = settings.ckpt_path
    resume = None if path is None else chosen(trainer.accelerator, path, settings.checkpoints, TRAINER_STEPS)
    if resume is not None:
        checkpoints.load(resume)
    trainer.train(resume_from_checkpoint=resume and str(resume))

    step = trainer.state.global_step
    if stopping.stopped:
        stop.leave(step)
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        settings.print_result(loss, settings.checkpoints / f"checkpoint-{step}")


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
        save_total_limit=None,  # WholeCheckpoints removes them; the Trainer would go by the times of files
        seed=settings.seed,
        ignore_data_skip=True,  # the loader begins at the right step
        report_to="none",  # Curves writes them
        disable_tqdm=not settings.progress_bar,
        ddp_find_unused_parameters=False,
        ddp_timeout=math.ceil(settings.hang_timeout_s or 1800),  # seconds; 1800 is the Trainer's default
        ddp_backend="gloo" if settings.on_cpu and world_size > 1 else None,  # one process has no group
        use_cpu=settings.on_cpu,
    )


if __name__ == "__main__":
    main()
