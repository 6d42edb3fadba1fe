"""A recipe's configuration without Lightning's Trainer, for Accelerate, the HF Trainer, `validate` and `plan`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from am_lightning.lightning import AdaptiveMemory
from am_lightning.loggers.reader import read_report
from am_lightning.optim.base import AdaptiveMemoryOptimizer
from am_lightning.optim.unwrap import unwrap_optimizer
from am_lightning.pretrain.checkpoints.ranks import together
from am_lightning.pretrain.checkpoints.run_folder import checkpoint_folder
from am_lightning.pretrain.commands.report.summary import next_commands, print_validation
from am_lightning.pretrain.data.text_data import TextData
from am_lightning.pretrain.model.lightning_module import LlamaPretraining, check_optimizer
from am_lightning.pretrain.model.shape import LlamaShape
from am_lightning.pretrain.runtime.atomic_files import replacing
from am_lightning.pretrain.runtime.cli import PretrainCLI, precision_of, settle
from am_lightning.pretrain.runtime.errors import RecipeError, require, require_counts

_RESUME_BEFORE = "Resume from a checkpoint before"
_CALM = "and lower the learning rate or set trainer.gradient_clip_val."


class RunConfig:
    """The settings of a training program, from YAMLs and a command line.

    Args:
        config: the resolved configuration of `fit`, as a run saves it.
        made: its model, data and callbacks.

    Raises:
        RecipeError: if a value is out of range.
    """

    def __init__(self, config: dict[str, Any], made: Any) -> None:
        trainer, checkpoint, seed = config["trainer"], config["checkpoint"], config["seed_everything"]
        require(type(seed) is int, "seed_everything", seed, "a whole number (true and false are for pretrain.py)")
        require_counts("trainer", **{key: trainer[key] for key in ("max_steps", "accumulate_grad_batches")})
        algorithm = trainer.get("gradient_clip_algorithm")
        require(algorithm in (None, "norm"), "trainer.gradient_clip_algorithm", algorithm, "norm, or null")
        self.config = config
        self.root = Path(trainer["default_root_dir"])  # the run's folder
        self.seed: int = seed  # seed of the initial weights
        self.shape: LlamaShape = made.model.shape
        self.data: TextData = made.data  # its plain methods need no Trainer
        self.data.default_root_dir = str(self.root)
        self.steps: int = trainer["max_steps"]  # optimizer steps of the run
        self.accumulate: int = trainer["accumulate_grad_batches"]  # micro-batches in a step
        self.clip = float(trainer["gradient_clip_val"] or 0) or None  # largest norm of the gradient
        self.precision: str = trainer["precision"] or precision_of(trainer["accelerator"])  # as Lightning spells it
        self.validate_every = _validate_every(trainer)  # optimizer steps between two validations; None: no validation
        self.log_every: int = trainer["log_every_n_steps"]  # optimizer steps between two points of the curves
        self.checkpoints = checkpoint_folder(config)
        self.save_every: int | None = checkpoint["every_n_train_steps"]  # None: after the last step only
        self.keep: int | None = checkpoint["keep"]  # how many checkpoints to keep; None: all
        self.ckpt_path: str | None = config["ckpt_path"]  # None, "last", or a checkpoint
        self.threads: int | None = config["threads"]  # torch's threads on the CPU; None: torch decides
        self.on_cpu = trainer["accelerator"] == "cpu" or not torch.accelerator.is_available()
        self.progress_bar = trainer["enable_progress_bar"] is not False
        # Seconds that a collective may wait for another rank; None: torch's default.
        self.hang_timeout_s: float | None = config["fault_tolerance"]["hang_timeout_s"]
        self._module: LlamaPretraining = made.model
        self._memory = next((c for c in made.trainer.callbacks or [] if isinstance(c, AdaptiveMemory)), None)

    def open_data(self) -> TextData:
        """Return the data, opened. One process of each machine makes the missing shards first. Collective."""
        from accelerate import PartialState  # pretrain.py does without it

        if self.threads is not None:  # Accelerate sets a number of its own for several processes on a CPU
            torch.set_num_threads(self.threads)
        with together():
            if PartialState().is_local_main_process:
                self.data.prepare()
        self.data.open()
        return self.data

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """Return the optimizer for `model`, with named groups; norms and embeddings get no weight decay.

        An AdamW becomes AMAdamW if the configuration has the AdaptiveMemory callback, as under Lightning.
        """
        return self._module.optimizer_for(model, self._memory)

    def check_optimizer(self) -> Optimizer:
        """Return an optimizer of weights that take no memory. RecipeError: if it cannot be made or converted."""
        return check_optimizer(self._module, self._memory)

    def make_schedule(self, optimizer: Optimizer) -> LambdaLR:
        """Return the schedule of the learning rate; step it after each optimizer step."""
        return self._module.schedule.scheduler(optimizer, self.steps)

    def mixed_precision(self) -> str:
        """Return Accelerate's name of the precision: "no", "bf16" or "fp16". RecipeError: if it has none."""
        names = {"32-true": "no", "bf16-mixed": "bf16", "16-mixed": "fp16"}
        require(self.precision in names, "trainer.precision", self.precision, " or ".join(names))
        return names[self.precision]

    def check_step(self, optimizer: Optimizer, step: int, loss: float) -> None:
        """Stop a run that no longer trains. Call it on every rank at the steps that are logged.

        Args:
            optimizer: the run's optimizer, or what wraps it.
            step: number of optimizer steps that are done.
            loss: mean over all ranks, in nats.

        Raises:
            RecipeError: on all ranks alike, if the optimizer has dropped ``max_consecutive_skips`` steps in a row, or
                if the loss is not finite and the optimizer drops no steps.
        """
        inner = unwrap_optimizer(optimizer)
        if isinstance(inner, AdaptiveMemoryOptimizer):
            limit = (self._memory or AdaptiveMemory()).max_consecutive_skips
            dropped = int(read_report(inner)[1].skipped_in_a_row)
            if dropped >= limit:
                raise RecipeError(
                    f"{dropped} steps in a row were dropped because a sum over gradients was not finite;"
                    f" max_consecutive_skips is {limit}. {_RESUME_BEFORE} step {step - dropped + 1}, {_CALM}"
                )
        elif not math.isfinite(loss):
            raise RecipeError(f"train/loss is {loss:g} at step {step}. {_RESUME_BEFORE} it, {_CALM}")

    def save(self, path: Path) -> None:
        """Write the resolved configuration, which the programs take as --config."""
        with replacing(path, "Free some space.") as file:
            file.write(yaml.safe_dump(self.config, sort_keys=False).encode())

    def print_result(self, loss: float, checkpoint: Path | None) -> None:
        """Print the validation loss of the finished run, in nats per token, and where its files are."""
        curves = f'tensorboard --logdir "{self.root / "logs"}"'
        lines = {"curves": curves, "checkpoint": str(checkpoint), "next": next_commands(self.root)}
        print_validation(loss, self.data.scored_rows, **lines)


def read_run_config(args: Sequence[str] | None = None) -> RunConfig:
    """Parse the command line of `fit`, with the YAMLs and keys that pretrain.py takes; default: sys.argv's.

    Raises:
        RecipeError: if a value is out of range, a UsageError after an unknown key or a wrong type.
        SystemExit: after --help.
    """
    parser = _Parser(args)
    return RunConfig(parser.config_dump, parser.config_init.fit)


def read_data(args: Sequence[str]) -> TextData:
    """Parse the command line of `fit` for its data only, without settings that a run needs, such as its steps.

    Raises:
        RecipeError, SystemExit: as in `read_run_config`.
    """
    parser = _Parser(args)
    data: TextData = parser.config_init.fit.data
    data.default_root_dir = parser.config.fit.trainer.default_root_dir
    return data


class _Parser(PretrainCLI):
    """PretrainCLI up to its model and data: there is no Trainer, and nothing is seeded or run."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        args = sys.argv[1:] if args is None else list(args)
        self.config = parser.parse_args(["fit", *args] if not args or args[0].startswith("--") else args)

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        if self.subcommand != "fit":
            raise RecipeError(f"this program has no command {self.subcommand}, only fit: use pretrain.py")
        settle(self.config.fit)

    def instantiate_classes(self) -> None:
        self._dump_config()
        config = self.config.clone()
        trainer = config.fit.trainer
        for key in ("strategy", "logger", "plugins", "profiler"):  # objects that only a Trainer can use
            trainer[key] = None
        # jsonargparse 4.49 renamed it, and the old name gives a warning.
        instantiate = getattr(self.parser, "instantiate", None) or self.parser.instantiate_classes
        self.config_init = instantiate(config)

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def _validate_every(trainer: dict[str, Any]) -> int | None:
    """Return the interval in optimizer steps; Lightning's is a number of micro-batches or a share of all of them."""
    interval, accumulate = trainer["val_check_interval"], trainer["accumulate_grad_batches"]
    if trainer.get("limit_val_batches") == 0:
        return None
    interval = 1.0 if interval is None else interval
    whole = isinstance(interval, int) and interval >= 1 and interval % accumulate == 0
    share = isinstance(interval, float) and 0 < interval <= 1
    allowed = f"a multiple of trainer.accumulate_grad_batches = {accumulate}, or 0 < share <= 1"
    require(whole or share, "trainer.val_check_interval", interval, allowed)
    return max(1, int(trainer["max_steps"] * interval)) if share else int(interval // accumulate)
