"""PretrainCLI: LightningCLI for LlamaPretraining on TextData, with all that a run writes in one folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

from am_lightning.lightning import AdaptiveMemory
from am_lightning.pretrain.callbacks.deepspeed_loss import LossDividedOnce
from am_lightning.pretrain.callbacks.fault_tolerance import FaultTolerance
from am_lightning.pretrain.callbacks.progress import BARS
from am_lightning.pretrain.callbacks.tensorboard import SaveRunConfig, TensorBoardLayout
from am_lightning.pretrain.callbacks.throughput import TrainingMonitor
from am_lightning.pretrain.checkpoints import (
    LAST,
    AtomicCheckpointIO,
    RunCheckpoint,
    check_readable,
    newest_whole,
    saved_hyperparameters,
    saved_step,
)
from am_lightning.pretrain.commands.compare import compare
from am_lightning.pretrain.commands.report.summary import RunResult, print_summary, print_validation
from am_lightning.pretrain.data.text_data import TextData
from am_lightning.pretrain.model.lightning_module import LlamaPretraining, check_optimizer
from am_lightning.pretrain.model.shape import LlamaShape
from am_lightning.pretrain.runtime.errors import RecipeError, require
from am_lightning.pretrain.runtime.operator_build import announce_deepspeed_build
from am_lightning.pretrain.runtime.paths import with_paths
from am_lightning.pretrain.runtime.run_lock import hold
from am_lightning.pretrain.runtime.secrets import refuse_secrets
from am_lightning.pretrain.runtime.suggestions import explain

CHECKPOINTS_PER_RUN = 5  # where the configuration does not say how often
# What a run leaves in its folder; a new run there moves it away first.
_RUN_FILES = ("checkpoints", "logs", "summary.png", "compare", "compare.png", "report.html", "report.png")


class PretrainParser(LightningArgumentParser):
    """A parser whose errors are a line or two, without the usage of every setting there is (--help shows it).

    A recipe's name may stand where a YAML's path is expected: `--config laptop`, or `fit laptop`.

    Attributes:
        words: the command line that is being read.
    """

    words: ClassVar[Sequence[str]] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if Path(sys.argv[0]).name == "__main__.py":
            kwargs.setdefault("prog", "am-lightning")
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # --trainer.max_step is a typing error, not trainer.max_steps

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        PretrainParser.words = with_paths(sys.argv[1:] if args is None else args)
        return super().parse_args(PretrainParser.words, *others, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        super().error(explain(message, parser.get_defaults(skip_validation=True).keys(), self.words), ex)

    def print_usage(self, file: Any = None) -> None:
        pass


class PretrainCLI(LightningCLI):
    """LightningCLI for LlamaPretraining on TextData that keeps a whole run in one folder.

    Attributes:
        result: of a finished `fit`, for the summary and for comparisons.
    """

    def __init__(self, args: Any = None) -> None:
        self.result: RunResult | None = None
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
        bars = Literal["tqdm", "rich"]
        parser.add_argument("--progress_bar", type=bars, default="tqdm", help="which one, with its figures behind it")
        parser.add_argument("--compare", type=bool, default=False, help="also train AdamW, and draw all in one picture")
        parser.link_arguments("model.seq_len", "data.seq_len")
        parser.link_arguments("model.vocab_size", "data.vocab_size")

    def _parse_ckpt_path(self) -> None:
        """Lightning would let a checkpoint's hyperparameters win over the command line. Here the command line wins."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        settle(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.resume_step = _resume_step(config.ckpt_path, Path(config.checkpoint.dirpath), config.model)
        if self.subcommand == "validate" and self.resume_step == 0:
            raise RecipeError(f"nothing to validate: --ckpt_path is {config.ckpt_path}, in {config.checkpoint.dirpath}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand].trainer
        if config.precision is None:
            kwargs["precision"] = precision_of(config.accelerator)
        if self.subcommand != "fit":  # a validation leaves the run's files alone
            kwargs["logger"] = False
            self.save_config_callback = None
        elif config.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(
                config.default_root_dir,
                name="logs",
                version="",
                default_hp_metric=False,
                purge_step=self.resume_step,  # a resumed run takes back the points after its checkpoint
            )
        plugins = config.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        kwargs["use_distributed_sampler"] = False  # the data's order knows the ranks
        callbacks = [*(config.callbacks or []), TensorBoardLayout(), LossDividedOnce()]
        if config.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            # The same bar everywhere: Lightning's default depends on whether rich is installed.
            # Redrawn where the Trainer logs and so waits for the device, too.
            every = max(1, config.log_every_n_steps or 1) * config.accumulate_grad_batches
            callbacks.append(BARS[self.config_init[self.subcommand].progress_bar](refresh_rate=every))
        trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        FaultTolerance.prepare(trainer)
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            announce_deepspeed_build()
        return trainer

    def before_fit(self) -> None:
        if self.trainer.is_global_zero:
            hold(Path(self.config.fit.checkpoint.dirpath))
        if self.config.fit.ckpt_path is None:
            # What may be wrong first: an error is to leave the earlier run where it is.
            require(self.trainer.max_steps >= 1, "trainer.max_steps", self.trainer.max_steps, "a whole number >= 1")
            self._check_optimizer()
            self.datamodule.trainer = self.trainer
            rank_zero_only(self.datamodule.prepare_data)()
            _move_earlier_run(Path(self.config.fit.trainer.default_root_dir))

    def _check_optimizer(self) -> None:
        """RecipeError, as `validate` gives it: an option is out of range, or the callback cannot convert it."""
        memory = next((c for c in self.trainer.callbacks if isinstance(c, AdaptiveMemory)), None)  # type: ignore[attr-defined]
        check_optimizer(self.model, memory)

    def after_validate(self) -> None:
        print_validation(RunResult.of(self.trainer, self.datamodule, self.config_init[self.subcommand].monitor))

    def after_fit(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            # The shards are where they belong. Lightning would move them there again, for which torch swaps every
            # tensor, and that it refuses where an optimizer has weak references to them.
            self.trainer.strategy.model_to_device = _nothing  # type: ignore[method-assign]
        self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        self.result = RunResult.of(self.trainer, self.datamodule, self.config_init[self.subcommand].monitor)
        print_summary(self.result)
        if self.config.fit.compare:
            compare(self.result, self.config_dump, lambda config: PretrainCLI({"subcommand": "fit", "fit": config}))


def _nothing() -> None:
    pass


def settle(config: Any) -> None:
    """Fill in, in a configuration of `fit`, what follows from other keys: the folders and the intervals.

    Raises:
        RecipeError: a value is out of range.
    """
    refuse_secrets(config.as_dict())
    trainer, checkpoint = config.trainer, config.checkpoint
    if config.threads is not None:
        require(config.threads >= 1, "threads", config.threads, "a whole number >= 1, or null")
    root = Path(trainer.default_root_dir or ".").expanduser().resolve()
    try:
        str(root).encode()
    except UnicodeEncodeError:
        problem = f"trainer.default_root_dir {root!a}: this locale has no such letters; set LC_ALL=C.UTF-8"
        raise RecipeError(problem) from None
    trainer.default_root_dir = str(root)
    checkpoint.dirpath = checkpoint.dirpath or str(root / "checkpoints")
    if trainer.max_steps > 0:
        if checkpoint.every_n_train_steps is None:
            checkpoint.every_n_train_steps = max(1, trainer.max_steps // CHECKPOINTS_PER_RUN)
        # However short the run, its curve has a point.
        trainer.log_every_n_steps = min(trainer.log_every_n_steps or 1, trainer.max_steps)


def _resume_step(ckpt_path: str | None, folder: Path, model: Any) -> int:
    """The steps that are done in the checkpoint this run goes on from; 0 where there is none.

    Rank 0 reads all of it; the others, who get its choice when the run starts, do not know (-1).
    """
    if ckpt_path is None:
        return 0
    if getattr(rank_zero_only, "rank", 0) != 0:
        return -1
    if ckpt_path == "last":
        path = newest_whole(folder)
    else:
        path = Path(ckpt_path)
        check_readable(path, folder)
    if path is None:
        moved = sorted((folder.parent / "earlier").glob("*"))
        hint = f" (runs of before are in {moved[0].parent}: --ckpt_path FILE goes on from one)" if moved else ""
        print(f"no checkpoint in {folder} yet: starting from step 0{hint}")
        return 0
    LlamaShape.among(model).load_state_dict(saved_hyperparameters(path))
    return saved_step(path)


def precision_of(accelerator: str) -> str:
    """Where the configuration does not say: bf16-mixed on a GPU that has bfloat16, else 32-true."""
    cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


@rank_zero_only
def _move_earlier_run(root: Path) -> None:
    """A new run in a folder that holds one: that one goes to `earlier/N`, so that nothing is mixed up or lost."""
    if not ((root / "logs" / "config.yaml").exists() or (root / "checkpoints" / LAST).exists()):
        return
    number = 1 + max((int(p.name) for p in (root / "earlier").glob("*") if p.name.isdigit()), default=0)
    target = root / "earlier" / str(number)
    target.mkdir(parents=True)
    for name in _RUN_FILES:
        if (root / name).exists():
            (root / name).rename(target / name)
    print(f"{root} held a run already: moved to {target}. To go on with a run: --ckpt_path last")
