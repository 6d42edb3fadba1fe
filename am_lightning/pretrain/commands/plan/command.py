"""`plan`: memory, traffic, time and disk of a configuration over a number of GPUs."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import Any

from am_lightning.pretrain.commands.plan.gpus import ASSUMED_MFU, GPUS
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.main import import_training
from am_lightning.pretrain.runtime.paths import find_config
from am_lightning.pretrain.runtime.settings import check_names

_USAGE = "am-lightning plan CONFIG --gpus N [options] [--KEY VALUE ...]"


def add_parser(subparsers: Any) -> None:
    """Add `plan`."""
    parser = subparsers.add_parser(
        "plan",
        help="memory, traffic, time and disk of a configuration over N GPUs; nothing is run",
        usage=_USAGE,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="a recipe's name or a YAML")
    # Behind CONFIG may stand options and keys of the configuration in any order, which read_options tells apart.
    parser.add_argument("settings", nargs=argparse.REMAINDER, metavar="--KEY VALUE", help="as for fit")
    _add_options(parser)
    parser.set_defaults(run=_run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, metavar="N", help="all of them; must be given")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="joined by the fast network")
    parser.add_argument("--gpu", default="H100", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--peak-tflops", type=float, metavar="T", help="of one GPU, in place of the data sheet's")
    parser.add_argument("--memory-gb", type=float, metavar="GB", help="of one GPU, in place of the data sheet's")
    mfu = "share of the peak that training reaches, as you have measured it; without it what is known of this GPU,"
    parser.add_argument("--mfu", type=float, help=f"{mfu} else {ASSUMED_MFU} is assumed")
    parser.add_argument("--node-bandwidth", type=float, default=450, metavar="GB/s", help="a GPU sends within its node")
    parser.add_argument("--bandwidth", type=float, default=50, metavar="GB/s", help="a GPU sends to other nodes")
    parser.add_argument("--json", action="store_true", help="print JSON, all sizes in bytes")


def read_options(args: argparse.Namespace) -> argparse.Namespace:
    """Take plan's own options out of what stands behind CONFIG; `settings` are the rest, for read_run_config.

    Raises:
        RecipeError: --gpus is missing. SystemExit: a value of the wrong type, or --help.
    """
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("plan", usage=_USAGE, formatter_class=formatter, allow_abbrev=False)
    _add_options(parser)
    args, keys = parser.parse_known_args(args.settings, args)
    if args.gpus is None:
        raise RecipeError(f"plan needs --gpus N. Usage: {_USAGE}")
    args.settings = ["--config", str(find_config(args.config)), *(key for key in keys if key != "--")]
    return args


def _run(args: argparse.Namespace) -> int:
    args = read_options(args)
    check_names(args.settings)
    import_training()
    from am_lightning.pretrain.commands.plan.make import make_plan
    from am_lightning.pretrain.commands.plan.plan import as_json
    from am_lightning.pretrain.commands.plan.table import print_plan
    from am_lightning.pretrain.runtime.run_config import read_run_config

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to stdout when it is imported
        settings = read_run_config(args.settings)
    plan = make_plan(settings, args)
    if args.json:
        print(json.dumps(as_json(plan), indent=2))
    else:
        print_plan(plan, args)
    return 0
