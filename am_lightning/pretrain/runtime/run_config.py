"""A recipe's configuration without Lightning's Trainer: what Accelerate, the HF Trainer, validate and plan read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from am_lightning.lightning import AdaptiveMemory
from am_lightning.pretrain.data.text_data import TextData
from am_lightning.pretrain.model.lightning_module import LlamaPretraining, check_optimizer
from am_lightning.pretrain.model.shape import LlamaShape
from am_lightning.pretrain.runtime.atomic_files import replacing
from am_lightning.pretrain.runtime.cli import PretrainCLI, precision_of, settle
from am_lightning.pretrain.runtime.errors import RecipeError, require


@dataclass(frozen=True)
class RunConfig:
    """What a training program needs to know, from a YAML and a command line.

    Attributes:
        root: the run's folder.
        seed: of the initial weights.
        shape: of the Llama.
        data: the text; its plain methods need no Trainer.
        steps: optimizer steps of the run.
        accumulate: micro-batches in a step.
        clip: largest norm of the gradient, or None.
        precision: as Lightning spells it: "32-true", "bf16-mixed", "16-mixed", ...
        validate_every: optimizer steps between two validations; None for none.
        log_every: optimizer steps between two points of the curves.
        checkpoints: their folder.
        save_every: optimizer steps between two checkpoints; None for the last step's only.
        keep: how many checkpoints to keep; None for all.
        ckpt_path: None, "last", or a checkpoint.
        accelerator: "auto", "cpu", "gpu", ...
        threads: of torch on the CPU; None: torch decides.
        progress_bar: whether to show one.
        hang_timeout_s: seconds that a collective may wait for another rank; None: torch's default.
        config: the resolved configuration, as a run saves it.
    """

    root: Path
    seed: int
    shape: LlamaShape
    data: TextData
    steps: int
    accumulate: int
    clip: float | None
    precision: str
    validate_every: int | None
    log_every: int
    checkpoints: Path
    save_every: int | None
    keep: int | None
    ckpt_path: str | None
    accelerator: str
    threads: int | None
    progress_bar: bool
    hang_timeout_s: float | None
    config: dict[str, Any]
    _module: LlamaPretraining
    _memory: AdaptiveMemory | None

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer for `model`: named groups, norms and embeddings without weight decay.

        An AdamW becomes AMAdamW where the configuration has the AdaptiveMemory callback, as under Lightning.
        """
        return self._module.optimizer_for(model, self._memory)

    def check_optimizer(self) -> Optimizer:
        """The optimizer for weights that take no memory. RecipeError: it cannot be made or converted."""
        return check_optimizer(self._module, self._memory)

    def make_schedule(self, optimizer: Optimizer) -> LambdaLR:
        """The learning rate's schedule; step it after each optimizer step."""
        return self._module.schedule.scheduler(optimizer, self.steps)

    def save(self, path: Path) -> None:
        """Write the resolved configuration, which the same programs take as --config."""
        with replacing(path, "Free some space.") as file:
            file.write(yaml.safe_dump(self.config, sort_keys=False).encode())


def read_run_config(args: Sequence[str] | None = None) -> RunConfig:
    """Parse the command line of `fit` (sys.argv's where None): the YAMLs and keys that pretrain.py takes.

    Raises:
        RecipeError: a value that does not fit. SystemExit: an unknown key, a wrong type, or --help.
    """
    return _Parser(args).settings()


class _Parser(PretrainCLI):
    """PretrainCLI up to its model and data: there is no Trainer, and nothing is seeded or run."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        args = sys.argv[1:] if args is None else list(args)
        self.config = parser.parse_args(["fit", *args] if not args or args[0].startswith("--") else args)

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        if self.subcommand != "fit":
            raise RecipeError(f"this program knows fit alone, not {self.subcommand}: use pretrain.py")
        config = self.config.fit
        require(config.trainer.max_steps >= 1, "trainer.max_steps", config.trainer.max_steps, "a whole number >= 1")
        settle(config)

    def instantiate_classes(self) -> None:
        self._dump_config()
        config = self.config.clone()
        trainer = config.fit.trainer
        for key in ("strategy", "logger", "plugins", "profiler"):  # objects that only a Trainer can use
            trainer[key] = None
        # jsonargparse 4.49 has renamed it; the old name warns.
        instantiate = getattr(self.parser, "instantiate", None) or self.parser.instantiate_classes
        self.config_init = instantiate(config)

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def settings(self) -> RunConfig:
        config, made = self.config_dump, self.config_init.fit
        root = Path(config["trainer"]["default_root_dir"])
        made.data.default_root_dir = str(root)
        trainer, checkpoint = config["trainer"], config["checkpoint"]
        seed = config["seed_everything"]
        require(type(seed) is int, "seed_everything", seed, "a whole number (true and false are for pretrain.py)")
        accumulate = trainer["accumulate_grad_batches"]
        require(accumulate >= 1, "trainer.accumulate_grad_batches", accumulate, "a whole number >= 1")
        return RunConfig(
            root=root,
            seed=seed,
            shape=made.model.shape,
            data=made.data,
            steps=trainer["max_steps"],
            accumulate=accumulate,
            clip=_clip(trainer),
            precision=trainer["precision"] or precision_of(trainer["accelerator"]),
            validate_every=_validate_every(trainer),
            log_every=trainer["log_every_n_steps"],
            checkpoints=Path(checkpoint["dirpath"]),
            save_every=checkpoint["every_n_train_steps"],
            keep=checkpoint["keep"],
            ckpt_path=config["ckpt_path"],
            accelerator=trainer["accelerator"],
            threads=config["threads"],
            progress_bar=trainer["enable_progress_bar"] is not False,
            hang_timeout_s=config["fault_tolerance"]["hang_timeout_s"],
            config=config,
            _module=made.model,
            _memory=next((c for c in made.trainer.callbacks or [] if isinstance(c, AdaptiveMemory)), None),
        )


def _clip(trainer: dict[str, Any]) -> float | None:
    algorithm = trainer.get("gradient_clip_algorithm")
    require(algorithm in (None, "norm"), "trainer.gradient_clip_algorithm", algorithm, "norm, or null")
    value = trainer["gradient_clip_val"]
    return float(value) if value else None


def _validate_every(trainer: dict[str, Any]) -> int | None:
    """Optimizer steps: Lightning's val_check_interval counts micro-batches, or is a share of all of them."""
    interval, accumulate = trainer["val_check_interval"], trainer["accumulate_grad_batches"]
    if trainer.get("limit_val_batches") == 0:
        return None
    if interval is None or isinstance(interval, float):
        require(interval is None or 0 < interval <= 1, "trainer.val_check_interval", interval, "0 < share <= 1")
        share: float = 1.0 if interval is None else interval
        return max(1, int(trainer["max_steps"] * share))
    fits = isinstance(interval, int) and interval >= 1 and interval % accumulate == 0
    allowed = f"a multiple of trainer.accumulate_grad_batches = {accumulate}, or a share (0.2)"
    require(fits, "trainer.val_check_interval", interval, allowed)
    return int(interval // accumulate)
