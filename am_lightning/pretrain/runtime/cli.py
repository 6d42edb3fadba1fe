"""PretrainCLI: LightningCLI for LlamaPretraining on TextData, whose runs write into one folder."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

from am_lightning.lightning import AdaptiveMemory
from am_lightning.pretrain.callbacks.fault_tolerance import FaultTolerance
from am_lightning.pretrain.callbacks.progress import BARS
from am_lightning.pretrain.callbacks.tensorboard import SaveRunConfig, TensorBoardLayout
from am_lightning.pretrain.callbacks.throughput import TrainingMonitor
from am_lightning.pretrain.checkpoints import AtomicCheckpointIO, RunCheckpoint
from am_lightning.pretrain.checkpoints.resume import saved_step
from am_lightning.pretrain.checkpoints.run_folder import checkpoint_folder, chosen, protect_earlier_run
from am_lightning.pretrain.checkpoints.weights import model_arguments
from am_lightning.pretrain.commands.compare import compare
from am_lightning.pretrain.commands.report.summary import RunResult, print_summary, print_validation
from am_lightning.pretrain.data.text_data import TextData
from am_lightning.pretrain.model.lightning_module import LlamaPretraining, check_optimizer
from am_lightning.pretrain.model.shape import LlamaShape
from am_lightning.pretrain.runtime.errors import RecipeError, UsageError, require, require_counts, require_encodable
from am_lightning.pretrain.runtime.operator_build import announce_deepspeed_build
from am_lightning.pretrain.runtime.paths import with_paths
from am_lightning.pretrain.runtime.run_lock import hold
from am_lightning.pretrain.runtime.secrets import refuse_secrets
from am_lightning.pretrain.runtime.settings import check_settings
from am_lightning.pretrain.runtime.suggestions import explain

CHECKPOINTS_PER_RUN = 5  # if the configuration sets no interval


class PretrainParser(LightningArgumentParser):
    """A parser whose errors are UsageErrors, without the usage of all settings (--help shows it).

    It takes a recipe's name in place of a YAML's path: `--config laptop`, or `fit laptop`.
    """

    words: ClassVar[Sequence[str]] = ()  # the command line that is being read

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if Path(sys.argv[0]).name == "__main__.py":
            kwargs.setdefault("prog", "am-lightning")
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # --trainer.max_step is an error, not trainer.max_steps

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        args = sys.argv[1:] if args is None else args
        if args and not args[0].startswith("-"):
            check_settings(args[1:])
        PretrainParser.words = with_paths(args)
        return super().parse_args(PretrainParser.words, *others, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of a class's arguments, whose error another parser shows
            super().error(message, ex)
        raise UsageError(explain(message, self.words)) from ex


class PretrainCLI(LightningCLI):
    """LightningCLI for LlamaPretraining on TextData that keeps a whole run in one folder."""

    def __init__(self, args: Any = None) -> None:
        self.result: RunResult | None = None  # set when `fit` has finished
        self.resume_step = 0
        super().__init__(
            LlamaPretraining,
            TextData,
            seed_everything_default=0,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True},  # a resumed run writes it again
            auto_configure_optimizers=False,  # groups and schedule are the module's
            parser_class=PretrainParser,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(FaultTolerance, "fault_tolerance")
        parser.add_lightning_class_args(TrainingMonitor, "monitor")
        parser.add_argument("--threads", type=int | None, default=None, help="CPU threads of torch; null: its default")
        parser.add_argument("--progress_bar", type=Literal["tqdm", "rich"], default="tqdm", help="the bar's library")
        parser.add_argument("--compare", type=bool, default=False, help="also train AdamW, and plot all runs together")
        parser.link_arguments("model.seq_len", "data.seq_len")
        parser.link_arguments("model.vocab_size", "data.vocab_size")

    def _parse_ckpt_path(self) -> None:
        """Keep the command line's values, which Lightning would replace by the checkpoint's hyperparameters."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        settle(config)
        folder = checkpoint_folder(config)
        self.resume_step = _resume_step(config.ckpt_path, folder, config.model)
        if self.subcommand == "validate" and self.resume_step == 0:
            raise RecipeError(f"nothing to validate: --ckpt_path is {config.ckpt_path}, in {folder}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand].trainer
        if config.precision is None:
            kwargs["precision"] = precision_of(config.accelerator)
        if self.subcommand != "fit":  # `validate` writes no files
            kwargs["logger"] = False
            self.save_config_callback = None
        elif config.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(
                config.default_root_dir,
                name="logs",
                version="",
                default_hp_metric=False,
                purge_step=self.resume_step,  # a resumed run removes the points after its checkpoint
            )
        plugins = config.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        kwargs["use_distributed_sampler"] = False  # TextData shares the rows out to the ranks
        callbacks = [*(config.callbacks or []), TensorBoardLayout()]
        if config.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            # Lightning's default bar depends on whether rich is installed.
            # It is redrawn when the Trainer logs, because only then the host waits for the device.
            every = max(1, config.log_every_n_steps or 1) * config.accumulate_grad_batches
            callbacks.append(BARS[self.config_init[self.subcommand].progress_bar](refresh_rate=every))
        try:
            trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (MisconfigurationException, ValueError) as error:  # such as more GPUs than there are
            raise RecipeError(f"trainer: {error}") from error
        FaultTolerance.prepare(trainer)
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            on_gpu = trainer.strategy.root_device.type == "cuda" or type(trainer.strategy) is not DeepSpeedStrategy
            require(on_gpu, "trainer.strategy", "deepspeed", "other strategies: Lightning runs DeepSpeed on GPUs only")
            announce_deepspeed_build()
        return trainer

    def before_fit(self) -> None:
        folder = checkpoint_folder(self.config.fit)
        if self.trainer.is_global_zero:
            hold(folder)
        # An error must not move an earlier run away, so everything is checked first.
        require_counts("trainer", max_steps=self.trainer.max_steps)
        refuse_no_validation(self.trainer)
        memory = (c for c in self.trainer.callbacks if isinstance(c, AdaptiveMemory))  # type: ignore[attr-defined]
        check_optimizer(self.model, next(memory, None))
        ckpt_path = self.config.fit.ckpt_path
        if ckpt_path is None:
            self.datamodule.trainer = self.trainer
            rank_zero_only(self.datamodule.prepare_data)()
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # which writes nothing
            rank_zero_only(protect_earlier_run)(Path(self.config.fit.trainer.default_root_dir), folder, ckpt_path)

    def before_validate(self) -> None:
        self.trainer.limit_val_batches = self.trainer.limit_val_batches or 1.0  # 0 is for `fit`

    def after_validate(self) -> None:
        print_validation(float(self.trainer.callback_metrics["val/loss"]), self.datamodule.scored_rows)

    def after_fit(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            # The shards are on their devices. Lightning would move them again, for which torch swaps every tensor, and
            # it refuses to swap a tensor to which an optimizer holds weak references.
            self.trainer.strategy.model_to_device = lambda: None  # type: ignore[method-assign]
        self.before_validate()
        self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        self.result = RunResult.of(self.trainer)
        print_summary(self.result, self.trainer, self.datamodule, self.config_init[self.subcommand].monitor)
        if self.config.fit.compare:
            compare(self.result, self.config_dump, lambda config: PretrainCLI({"subcommand": "fit", "fit": config}))


def settle(config: Any) -> None:
    """Fill in the settings of `fit` that follow from others, the folders and the intervals, and set torch's threads.

    Raises:
        RecipeError: if a value is out of range.
    """
    refuse_secrets(config.as_dict())
    trainer, checkpoint = config.trainer, config.checkpoint
    require(config.threads is None or config.threads >= 1, "threads", config.threads, "a whole number >= 1, or null")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    clip, accumulate = trainer.gradient_clip_val, trainer.accumulate_grad_batches
    require(clip is None or 0 <= clip < math.inf, "trainer.gradient_clip_val", clip, "0 <= value, or null")
    require_counts("trainer", accumulate_grad_batches=accumulate)
    interval = trainer.val_check_interval
    require(interval != 0, "trainer.val_check_interval", interval, "> 0; for no validation: limit_val_batches 0")
    require_counts("trainer", check_val_every_n_epoch=trainer.check_val_every_n_epoch)
    root = Path(trainer.default_root_dir or ".").expanduser().resolve()
    require_encodable("trainer.default_root_dir", str(root))
    require_encodable("data.source", config.data.source)
    trainer.default_root_dir = str(root)
    if trainer.max_steps > 0:
        if checkpoint.every_n_train_steps is None:
            checkpoint.every_n_train_steps = max(1, trainer.max_steps // CHECKPOINTS_PER_RUN)
        # A run that is shorter than the interval still logs one point.
        trainer.log_every_n_steps = min(trainer.log_every_n_steps or 1, trainer.max_steps)


def refuse_no_validation(trainer: Trainer) -> None:
    """Raise a RecipeError if the interval counts micro-batches of an epoch, and the run has fewer."""
    steps, limit = trainer.max_steps * trainer.accumulate_grad_batches, trainer.limit_train_batches
    batches = min(steps, limit) if isinstance(limit, int) else int(steps * limit)
    interval = trainer.val_check_interval
    counts = isinstance(interval, int) and trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches > 0
    allowed = f"1 to {batches}, the micro-batches of the run; more with trainer.check_val_every_n_epoch null"
    require(not counts or interval <= batches, "trainer.val_check_interval", interval, allowed)


def _resume_step(ckpt_path: str | None, folder: Path, model: Any) -> int:
    """Return the number of steps that the checkpoint to resume from has done, or 0 if there is none.

    Only rank 0 reads the checkpoint, and the other ranks get its choice when the run starts: they return -1.
    """
    if ckpt_path is None:
        return 0
    if getattr(rank_zero_only, "rank", 0) != 0:
        return -1
    path = chosen(ckpt_path, folder)
    if path is None:
        moved = sorted((folder.parent / "earlier").glob("*"))
        hint = f" (earlier runs are in {moved[0].parent}: --ckpt_path FILE resumes one)" if moved else ""
        print(f"no checkpoint in {folder} yet: starting from step 0{hint}")
        return 0
    step = saved_step(path)
    LlamaShape.among(model).load_state_dict(model_arguments(path))
    return step


def precision_of(accelerator: str) -> str:
    """Return the default precision: bf16-mixed on a GPU that has bfloat16, else 32-true."""
    cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
