"""A plan from a configuration and the options of `plan`."""

from __future__ import annotations

import argparse
import math

from am_lightning.pretrain.commands.plan import measured
from am_lightning.pretrain.commands.plan.gpus import ASSUMED_MFU, GPUS, peak_tflops
from am_lightning.pretrain.commands.plan.layout import ParallelPlan, make_layout
from am_lightning.pretrain.commands.plan.memory import memory_of
from am_lightning.pretrain.commands.plan.plan import Plan, checkpoint_bytes
from am_lightning.pretrain.commands.plan.speed import speed_of
from am_lightning.pretrain.commands.plan.traffic import traffic_of
from am_lightning.pretrain.model.shape import count_parameters, count_tensors
from am_lightning.pretrain.runtime.errors import RecipeError, require
from am_lightning.pretrain.runtime.run_config import RunConfig


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
