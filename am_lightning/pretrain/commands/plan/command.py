"""`plan`: memory, traffic, time and disk of a configuration on a number of GPUs."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys

from am_lightning.pretrain.commands.arguments import add_config, read_settings
from am_lightning.pretrain.commands.plan.measured import ASSUMED_MFU, GPUS
from am_lightning.pretrain.runtime.errors import require


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
    _check(args)
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


def _check(args: argparse.Namespace) -> None:
    """Raise a RecipeError if an option is out of range."""
    for name in ("mfu", "peak_tflops", "memory_gb", "node_bandwidth", "bandwidth"):
        value = getattr(args, name)
        highest = 1 if name == "mfu" else math.inf
        allowed = f"0 < value{' <= 1' if highest == 1 else ''}"
        require(value is None or 0 < value <= highest, f"--{name.replace('_', '-')}", value, allowed)
    for name in ("gpus", "gpus_per_node"):
        require(getattr(args, name) >= 1, f"--{name.replace('_', '-')}", getattr(args, name), "a whole number >= 1")
    allowed = f"one of {', '.join(GPUS)}; another one together with --peak-tflops and --memory-gb"
    require(args.gpu in GPUS or None not in (args.peak_tflops, args.memory_gb), "--gpu", args.gpu, allowed)
