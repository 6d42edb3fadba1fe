"""A plan: what a run of a configuration takes on a number of GPUs."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from am_lightning.pretrain.commands.plan.layout import ParallelPlan, make_layout
from am_lightning.pretrain.commands.plan.measured import ASSUMED_MFU, GPUS, Gpu, Measured, nearest
from am_lightning.pretrain.commands.plan.memory import RESERVE, Memory, memory_of
from am_lightning.pretrain.commands.plan.traffic import Traffic, traffic_of
from am_lightning.pretrain.model.shape import count_parameters, count_tensors, flops_per_token
from am_lightning.pretrain.runtime.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Speed:
    """Time of a run."""

    tokens_per_step: int  # all GPUs together
    tokens_per_second: float  # all GPUs together
    step_seconds: float  # computation of a step at the plan's MFU
    communication_seconds: float  # time to send a step's bytes if no computation hides it
    days: float  # the whole run, without validations


@dataclasses.dataclass(frozen=True)
class Plan:
    """The resources that a run needs. Sizes are in bytes."""

    parameters: int
    tensors: int
    layout: ParallelPlan
    memory: Memory
    gpu_memory: int
    traffic: Traffic
    speed: Speed
    mfu: float
    mfu_is_assumed: bool
    measured: Measured | None
    tokenizer: str
    steps: int
    checkpoint_bytes: int

    @property
    def needed(self) -> int:
        """Memory that a GPU needs: the peak and the reserve."""
        return self.memory.total(self.memory.peak) + RESERVE

    @property
    def fits(self) -> bool:
        return self.needed <= self.gpu_memory

    def as_json(self) -> dict[str, Any]:
        """Return the plan as plain values, with what follows from them."""
        layout, memory = self.layout, self.memory
        moments = {name: memory.total(name) for name in memory.moments}
        found = dataclasses.asdict(self)
        found["layout"] |= {"data": layout.data, "nodes": layout.nodes}
        found["memory"] |= {"totals": moments, "peak": moments[memory.peak]}
        found["traffic"]["total"] = self.traffic.total
        return {**found, "reserve": RESERVE, "needed": self.needed, "fits": self.fits}


def make_plan(settings: RunConfig, args: argparse.Namespace) -> Plan:
    """Plan a configuration with the options of the command line.

    Raises:
        RecipeError: if numbers do not divide each other.
    """
    model, shape = settings.config["model"], settings.shape
    layout = make_layout(settings, args.gpus, args.gpus_per_node)
    checkpointing = bool(model["activation_checkpointing"])
    traffic = traffic_of(shape, layout, checkpointing=checkpointing)
    sheet = GPUS.get(args.gpu, Gpu(args.peak_tflops, args.peak_tflops, args.memory_gb))
    peak = args.peak_tflops or (sheet.fp32_tflops if layout.precision == "32-true" else sheet.bf16_tflops)
    parameters, shown = count_parameters(shape), None
    if args.mfu is None and args.peak_tflops is None:  # another peak means another GPU
        shown = nearest(args.gpu, parameters, layout.precision, compiled=bool(model["compile"]))
    # Weights and two moments as they are stored; DeepSpeed stores its 16-bit weights and float32 ones.
    zero = 12 + (2 if layout.compute_bytes == 2 else 0)
    mfu = args.mfu or (ASSUMED_MFU if shown is None else shown.tflops / peak)
    tokens = layout.data * layout.accumulate * layout.rows * shape.seq_len
    per_second = layout.gpus * peak * 1e12 * mfu / flops_per_token(shape)
    step = tokens / per_second
    between = args.bandwidth if layout.nodes > 1 else args.node_bandwidth
    within = args.node_bandwidth if layout.tensor <= layout.gpus_per_node else args.bandwidth
    sending = sum(traffic.data.values()) / (between * 1e9) + sum(traffic.tensor.values()) / (within * 1e9)
    return Plan(
        parameters=parameters,
        tensors=count_tensors(shape),
        layout=layout,
        memory=memory_of(shape, layout, checkpointing=checkpointing),
        gpu_memory=int(1e9 * (args.memory_gb or sheet.memory_gb)),
        traffic=traffic,
        speed=Speed(tokens, per_second, step, sending, days=settings.steps * step / 86400),
        mfu=mfu,
        mfu_is_assumed=args.mfu is None and shown is None,
        measured=shown,
        tokenizer=settings.data.tokenizer,
        steps=settings.steps,
        checkpoint_bytes=(zero if layout.kind == "zero" else 3 * layout.weight_bytes) * parameters,
    )
