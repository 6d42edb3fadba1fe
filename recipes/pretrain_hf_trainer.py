"""Pretrain a Llama with transformers' Trainer: the same recipes as pretrain.py, the same rows in the same order.

    accelerate launch pretrain_hf_trainer.py --config laptop [--KEY VALUE ...]
    torchrun --nproc-per-node 2 pretrain_hf_trainer.py --config laptop --trainer.accelerator cpu

The recipe's `trainer` section becomes TrainingArguments: see training_arguments. Checkpoints are the Trainer's folders,
`checkpoint-N`, below the recipe's checkpoint folder.
"""

from __future__ import annotations

import math
import os
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
from am_lightning.pretrain.checkpoints.atomic import prune
from am_lightning.pretrain.checkpoints.manifest import sync_files, write_manifest
from am_lightning.pretrain.commands.report.summary import next_commands
from am_lightning.pretrain.model.network import build_llama, token_loss
from am_lightning.pretrain.runtime.atomic_files import replacing
from am_lightning.pretrain.runtime.collective_errors import Agreement, leave_group, limit_waits
from am_lightning.pretrain.runtime.main import command_line
from am_lightning.pretrain.runtime.run_config import RunConfig, read_run_config
from am_lightning.pretrain.runtime.stop_signals import StopSignals

CURVES = {"loss": "train/loss", "learning_rate": "lr", "grad_norm": "grad_norm", "eval_loss": "val/loss"}
DATA_FILE = "data.pt"  # in each checkpoint: which model it is, and on which data it was trained
FOLDERS = "checkpoint-*"


def main(args: list[str] | None = None) -> None:
    """Run the command line `args` (sys.argv's where None)."""
    with command_line():
        train(read_run_config(args))


class RecipeOptimizer:
    """The Trainer's factory form. (With options of your own: AMAdamWFactory from am_lightning.huggingface.)"""

    def __call__(self, model: nn.Module, settings: RunConfig) -> torch.optim.Optimizer:
        return settings.make_optimizer(model)


class RecipeTrainer(Trainer):
    """Trainer whose rows, loss and schedule are the recipe's."""

    def __init__(self, settings: RunConfig, **options: Any) -> None:
        self.settings = settings
        optimizer = (RecipeOptimizer, {"settings": settings})
        super().__init__(optimizer_cls_and_kwargs=optimizer, eval_dataset=[], **options)  # see get_eval_dataloader
        self.model_accepts_loss_kwargs = False  # compute_loss gives the mean of a micro-batch

    def get_train_dataloader(self) -> DataLoader:
        """Not prepared by Accelerate: every process asks for its own rows."""
        data, args = self.settings.data, self.args
        loader = data.train_loader(
            steps=self.settings.steps,
            rank=args.process_index,
            world_size=args.world_size,
            accumulate=self.settings.accumulate,
            first_step=lambda: self.state.global_step,
            pin_memory=args.device.type == "cuda",
        )
        loader.collate_fn = as_inputs
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        data, args = self.settings.data, self.args
        rows = data.val_rows if self.is_in_train else data.final_val_rows
        loader = data.val_loader(rank=args.process_index, world_size=args.world_size, rows=rows)
        loader.collate_fn = as_inputs
        return loader

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **options: Any) -> Tensor:
        """The rows are in pinned memory, so that the host need not wait for their copy."""
        rows = inputs["input_ids"].to(self.args.device, non_blocking=True)
        return super().training_step(model, dict.fromkeys(inputs, rows), *args, **options)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **options: Any
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        loss = token_loss(outputs.logits, inputs["input_ids"])
        return (loss, outputs) if return_outputs else loss

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = self.settings.make_schedule(optimizer or self.optimizer)
        return self.lr_scheduler


def as_inputs(rows: list[Tensor] | Tensor) -> dict[str, Tensor]:
    """Rows of tokens, or a batch of them, as the Trainer passes batches on."""
    batch = rows if isinstance(rows, Tensor) else default_collate(rows)
    return {"input_ids": batch, "labels": batch}


class Curves(TrainerCallback):
    """Writes what the Trainer logs to TensorBoard, with the names that the recipe's other programs use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: SummaryWriter | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        self.writer = self.writer or SummaryWriter(str(self.folder))
        for key, value in logs.items():
            if key in CURVES or key.startswith("am/"):
                self.writer.add_scalar(CURVES.get(key, key), value, state.global_step)
        if "eval_loss" in logs:
            self.writer.add_scalar("val/perplexity", math.exp(logs["eval_loss"]), state.global_step)
        self.writer.flush()


class WholeCheckpoints(TrainerCallback):
    """Keeps with every checkpoint which model it is and on which data it was trained, and a manifest; refuses others.

    The Trainer writes a checkpoint in its place: one without a manifest was not finished.
    """

    def __init__(self, settings: RunConfig) -> None:
        self.data, self.shape, self.keep = settings.data, settings.shape, settings.keep

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        data = self.data.state_dict()
        PartialState().wait_for_everyone()  # each writes the state of its own random numbers
        if state.is_world_process_zero:
            path = Path(args.output_dir, f"checkpoint-{state.global_step}")
            with replacing(path / DATA_FILE, "Free some space, then start again.") as file:
                torch.save({"shape": self.shape.state_dict(), "data": data}, file)
            sync_files(path)
            write_manifest(path)
            prune(list(path.parent.glob(FOLDERS)), self.keep)

    def load(self, folder: Path) -> None:
        """Raises: RecipeError: the checkpoint in `folder` is of another model, or was trained on other data."""
        found = torch.load(folder / DATA_FILE, weights_only=True)
        self.shape.load_state_dict(found["shape"])
        self.data.load_state_dict(found["data"])


class StopAtStep(TrainerCallback):
    """After a signal to any process: save at the end of the step (on several GPUs of the one after), then stop."""

    def __init__(self, stop: StopSignals, args: TrainingArguments) -> None:
        self.stop, self.agreement = stop, Agreement(args.device, args.world_size)
        self.stopped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop.later = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.agreement.ask(1 if self.stop.received else 0):
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last step is saved: also a signal in it is obeyed."""
        self.stopped = self.agreement.ask(1 if self.stop.received else 0, now=True) > 0 or self.stopped
        self.stop.later = self.stopped


def train(settings: RunConfig) -> None:
    stop = StopSignals()
    stop.take()
    args = training_arguments(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    limit_waits(settings.hang_timeout_s if args.world_size > 1 else None)  # gloo's group does not get ddp_timeout
    with args.main_process_first(desc="token shards"):
        if args.local_process_index == 0:
            settings.data.prepare()
    settings.data.open()

    set_seed(settings.seed)
    model = build_llama(settings.shape)
    checkpoints = WholeCheckpoints(settings)
    callbacks = [Curves(settings.root / "logs"), checkpoints]
    if is_adaptive(settings):
        callbacks.append(AdaptiveMemoryCallback())
    trainer = RecipeTrainer(settings, model=model, args=args, callbacks=callbacks)
    stopping = StopAtStep(stop, args)
    trainer.add_callback(stopping)
    hold_together(trainer.accelerator, settings.checkpoints)
    if trainer.is_world_process_zero():
        settings.save(settings.root / "logs" / "config.yaml")
    path = settings.ckpt_path
    resume = None if path is None else chosen(trainer.accelerator, path, settings.checkpoints, FOLDERS)
    if resume is not None:
        checkpoints.load(resume)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))

    step = trainer.state.global_step
    if stopping.stopped:
        leave_group()
        stop.leave(step)
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        print(
            f"\n  validation loss  {loss:.4f} nats per token (perplexity {math.exp(loss):.2f}) on"
            f" {settings.data.scored_rows} held-out rows\n"
            f'  curves           tensorboard --logdir "{settings.root / "logs"}"\n'
            f"  checkpoint       {settings.checkpoints / f'checkpoint-{step}'}\n"
            f"  next             {next_commands(settings.root)}\n"
        )


def training_arguments(settings: RunConfig) -> TrainingArguments:
    """What the recipe says, in the Trainer's words."""
    cpu = settings.accelerator == "cpu" or not torch.accelerator.is_available()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return TrainingArguments(
        output_dir=str(settings.checkpoints),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.data.batch_size // (settings.accumulate * world_size),
        per_device_eval_batch_size=settings.data.val_batch_size,
        gradient_accumulation_steps=settings.accumulate,
        max_grad_norm=settings.clip or 0.0,
        bf16=settings.precision == "bf16-mixed",
        fp16=settings.precision == "16-mixed",
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="no" if settings.validate_every is None else "steps",
        eval_steps=settings.validate_every,
        prediction_loss_only=True,
        save_strategy="no" if settings.save_every is None else "steps",
        save_steps=settings.save_every or 1,
        save_total_limit=None,  # WholeCheckpoints': the Trainer's goes by the times of files
        seed=settings.seed,
        ignore_data_skip=True,  # the loader begins at the right step
        report_to="none",  # Curves does
        disable_tqdm=not settings.progress_bar,
        ddp_find_unused_parameters=False,
        ddp_timeout=math.ceil(settings.hang_timeout_s or 1800),  # seconds; 1800 is the Trainer's default
        ddp_backend="gloo" if cpu and world_size > 1 else None,  # one process has no group
        use_cpu=cpu,
    )


def is_adaptive(settings: RunConfig) -> bool:
    """Whether the recipe's optimizer has a momentum to log."""
    optimizer = settings.make_optimizer(nn.Linear(1, 1))
    return isinstance(optimizer, AMAdamW | AMSGD)


if __name__ == "__main__":
    main()
