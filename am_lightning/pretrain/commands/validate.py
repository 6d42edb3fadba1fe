"""`validate`: check a configuration; nothing is trained."""

from __future__ import annotations

import argparse
from typing import Any

from am_lightning.pretrain.runtime.main import import_training
from am_lightning.pretrain.runtime.paths import find_config
from am_lightning.pretrain.runtime.settings import check_names


def add_parser(subparsers: Any) -> None:
    """Add `validate`."""
    parser = subparsers.add_parser(
        "validate",
        help="check a configuration: keys, types, sizes that must divide, paths; nothing is trained",
        usage="%(prog)s CONFIG [--KEY VALUE ...]",
    )
    parser.add_argument("config", metavar="CONFIG", help="a recipe's name or a YAML")
    parser.add_argument("settings", nargs=argparse.REMAINDER, metavar="--KEY VALUE", help="as for fit")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    path = find_config(args.config)
    check_names(["--config", str(path), *args.settings])
    import_training()
    from am_lightning.pretrain.commands.checks import check
    from am_lightning.pretrain.runtime.run_config import read_run_config

    settings = read_run_config(["--config", str(path), *args.settings])
    lines = list(check(settings))
    print(f"OK: {path}")
    for name, text in lines:
        print(f"  {name:<10} {text}")
    return 0
