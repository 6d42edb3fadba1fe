"""`plan`: memory, traffic, time and disk of a configuration over a number of GPUs."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from typing import Any

from am_lightning.pretrain.commands.plan import measured
from am_lightning.pretrain.commands.plan.layout import ParallelPlan, make_layout
from am_lightning.pretrain.commands.plan.memory import memory_of
from am_lightning.pretrain.commands.plan.plan import Plan, as_json, checkpoint_bytes
from am_lightning.pretrain.commands.plan.speed import ASSUMED_MFU, GPUS, peak_tflops, speed_of
from am_lightning.pretrain.commands.plan.table import print_plan
from am_lightning.pretrain.commands.plan.traffic import traffic_of
from am_lightning.pretrain.model.network import count_parameters, count_tensors
from am_lightning.pretrain.runtime.errors import RecipeError, require
from am_lightning.pretrain.runtime.paths import find_config
from am_lightning.pretrain.runtime.run_config import RunConfig, read_run_config

_USAGE = "python -m am_lightning.recipes plan CONFIG --gpus N [options] [--KEY VALUE ...]"


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
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to stdout when it is imported
        settings = read_run_config(args.settings)
    plan = make_plan(settings, args)
    if args.json:
        print(json.dumps(as_json(plan), indent=2))
    else:
        print_plan(plan, args)
    return 0


def make_plan(settings: RunConfig, args: argparse.Namespace) -> Plan:
    """The plan for a configuration and the options of the command line.

    Raises:
        RecipeError: numbers that do not divide, or are out of range.
    """
    for name in ("mfu", "peak_tflops", "memory_gb", "node_bandwidth", "bandwidth"):
        value = getattr(args, name)
        highest = 1 if name == "mfu" else math.inf
        allowed = f"0 < value{' <= 1' if highest == 1 else ''}"
        require(value is None or 0 < value <= highest, f"--{name.replace('_', '-')}", value, allowed)
    trainer, shape = settings.config["trainer"], settings.shape
    layout = make_layout(
        shape,
        trainer["strategy"],
        batch_size=settings.data.batch_size,
        accumulate=settings.accumulate,
        precision=trainer["precision"] or "bf16-mixed",  # what a GPU gets where the configuration does not say
        gpus=args.gpus,
        gpus_per_node=args.gpus_per_node,
    )
    checkpointing = bool(settings.config["model"]["activation_checkpointing"])
    traffic = traffic_of(shape, layout, checkpointing=checkpointing)
    peak = peak_tflops(args.gpu, layout.precision) if args.peak_tflops is None else args.peak_tflops
    parameters = count_parameters(shape)
    shown = _measured(settings, args, layout, parameters)
    mfu = args.mfu or (ASSUMED_MFU if shown is None else shown.tflops / peak)
    speed = speed_of(
        shape,
        layout,
        traffic,
        steps=settings.steps,
        tflops=peak,
        mfu=mfu,
        node_bandwidth=args.node_bandwidth,
        network_bandwidth=args.bandwidth,
    )
    if args.memory_gb is None and args.gpu not in GPUS:
        raise RecipeError(f"--gpu is {args.gpu!r}, whose memory is not known: give --memory-gb")
    return Plan(
        parameters=parameters,
        tensors=count_tensors(shape),
        layout=layout,
        memory=memory_of(shape, layout, checkpointing=checkpointing),
        gpu_memory=int(1e9 * (args.memory_gb or GPUS[args.gpu].memory_gb)),
        traffic=traffic,
        speed=speed,
        mfu=mfu,
        mfu_is_assumed=args.mfu is None and shown is None,
        measured=shown,
        tokenizer=settings.data.tokenizer,
        steps=settings.steps,
        checkpoint_bytes=checkpoint_bytes(parameters, layout),
    )


def _measured(
    settings: RunConfig, args: argparse.Namespace, layout: ParallelPlan, parameters: int
) -> measured.Measured | None:
    """What comes nearest to this run; None where an option says otherwise: with another peak it is another GPU."""
    if args.mfu is not None or args.peak_tflops is not None:
        return None
    compiled = bool(settings.config["model"]["compile"])
    return measured.nearest(
        measured.read_measured(measured.FILE), args.gpu, parameters, layout.precision, compiled=compiled
    )
