"""python -m am_lightning.recipes list | cp NAME DIR | validate CONFIG | plan CONFIG --gpus N | fit ... | report RUN |
sample RUN --prompt TEXT | export RUN DIR."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from am_lightning.pretrain.runtime.main import command_line

# Each has add_parser(subparsers), which sets the default `run`: arguments -> exit status.
_COMMANDS = (
    "am_lightning.pretrain.commands.list",
    "am_lightning.pretrain.commands.copy",
    "am_lightning.pretrain.commands.validate",
    "am_lightning.pretrain.commands.plan.command",
    "am_lightning.pretrain.commands.report.command",
    "am_lightning.pretrain.commands.sample",
    "am_lightning.pretrain.commands.export",
)


def main(args: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status."""
    args = sys.argv[1:] if args is None else list(args)
    with command_line():
        if args[:1] == ["fit"]:  # LightningCLI's own, with all its keys
            from am_lightning.pretrain.runtime.cli import PretrainCLI

            PretrainCLI(args)
            return 0
        chosen = make_parser().parse_args(args)
        return int(chosen.run(chosen))


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line, with every subcommand."""
    parser = argparse.ArgumentParser(
        prog="python -m am_lightning.recipes",
        description="Pretraining recipes: what there is, an editable copy, a check, a plan, a run, a report.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in _COMMANDS:
        importlib.import_module(name).add_parser(commands)
    commands.add_parser("fit", help="train with Lightning: fit NAME [--KEY VALUE ...], as pretrain.py does")
    return parser


if __name__ == "__main__":
    sys.exit(main())
