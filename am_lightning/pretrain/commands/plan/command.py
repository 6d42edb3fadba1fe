"""`plan`: memory, traffic, time and disk of a configuration on a number of GPUs."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys

from am_lightning.pretrain.commands.arguments import add_config, read_settings
from am_lightning.pretrain.commands.plan.measured import ASSUMED_MFU, GPUS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan`."""
    add_config(parser, "--gpus N [options]")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs, on all nodes together")
    per_node = "number of GPUs in a node; default: %(default)s"
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help=per_node)
    parser.add_argument("--gpu", default="H100", help=f"one of {', '.join(GPUS)}; default: %(default)s")
    parser.add_argument("--peak-tflops", type=float, metavar="T", help="peak of one GPU; default: the data sheet's")
    parser.add_argument("--memory-gb", type=float, metavar="GB", help="memory of one GPU; default: the data sheet's")
    mfu = f"share of the peak that training reaches; default: as measured on this GPU, or {ASSUMED_MFU}"
    parser.add_argument("--mfu", type=float, help=mfu)
    bandwidth = "what a GPU can send to GPUs of {} node; default: %(default)s"
    parser.add_argument("--node-bandwidth", type=float, default=450, metavar="GB/s", help=bandwidth.format("its own"))
    parser.add_argument("--bandwidth", type=float, default=50, metavar="GB/s", help=bandwidth.format("another"))
    parser.add_argument("--json", action="store_true", help="print JSON, with all sizes in bytes")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to stdout when it is imported
        settings = read_settings(args)
    from am_lightning.pretrain.commands.plan.plan import make_plan
    from am_lightning.pretrain.commands.plan.table import print_plan

    plan = make_plan(settings, args)
    if args.json:
        print(json.dumps(plan.as_json(), indent=2))
    else:
        print_plan(plan, args)
    return 0
