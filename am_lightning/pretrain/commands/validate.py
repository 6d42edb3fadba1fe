"""`validate`: check a configuration; nothing is trained."""

from __future__ import annotations

import argparse

from am_lightning.pretrain.commands.arguments import add_config, read_settings
from am_lightning.pretrain.runtime.paths import find_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `validate`."""
    add_config(parser)


def run(args: argparse.Namespace) -> int:
    """Check the configuration, and print what a run of it would be."""
    settings = read_settings(args)
    from am_lightning.pretrain.commands.checks import check

    lines = list(check(settings))
    print(f"OK: {find_config(args.config)}")
    for name, text in lines:
        print(f"  {name:<10} {text}")
    return 0
