"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.main import import_training
from am_lightning.pretrain.runtime.paths import find_config
from am_lightning.pretrain.runtime.settings import check_settings

if TYPE_CHECKING:
    from am_lightning.pretrain.runtime.run_config import RunConfig


RUN = "the folder of a run (its trainer.default_root_dir), or one of its checkpoints"


def add_config(parser: argparse.ArgumentParser, options: str = "") -> None:
    """Add CONFIG, and let `settings` of fit follow it; `options` stand between the two in the usage line."""
    parser.usage = " ".join(filter(None, ("%(prog)s CONFIG", options, "[--KEY VALUE ...]")))
    parser.epilog = "--KEY VALUE changes a setting, as in fit."
    parser.allow_abbrev = False
    parser.add_argument("config", metavar="CONFIG", help="name of a recipe, or a YAML file")
    parser.set_defaults(settings=[])  # the console puts the arguments here that `parser` does not know


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add RUN and --tokenizer, which `open_run` takes."""
    text = "folder of a run, whose newest whole checkpoint is used, or a checkpoint"
    parser.add_argument("path", metavar="RUN", type=_existing, help=text)
    parser.add_argument("--tokenizer", help="as data.tokenizer, or a tokenizer.json; default: the run's")


def _existing(name: str) -> Path:
    path = Path(name).expanduser().resolve()
    if not path.exists():
        raise RecipeError(f"RUN is {name!r}: there is no such file or folder; allowed: {RUN}")
    return path


def read_settings(args: argparse.Namespace) -> RunConfig:
    """Read the configuration that CONFIG and the settings make up.

    Raises:
        RecipeError: if there is no such configuration or setting, or a value is out of range.
    """
    words = ["--config", str(find_config(args.config)), *(word for word in args.settings if word != "--")]
    check_settings(words)
    import_training()
    from am_lightning.pretrain.runtime.run_config import read_run_config

    return read_run_config(words)
