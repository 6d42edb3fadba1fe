"""The table of a plan."""

from __future__ import annotations

import argparse

from am_lightning.pretrain.commands.list import scaled, short
from am_lightning.pretrain.commands.plan.layout import ParallelPlan
from am_lightning.pretrain.commands.plan.memory import RESERVE, Memory
from am_lightning.pretrain.commands.plan.plan import Plan
from am_lightning.pretrain.data.tokenizer import GATED_CURE, is_gated


def print_plan(plan: Plan, args: argparse.Namespace) -> None:
    """Print a plan as text."""
    layout, speed = plan.layout, plan.speed
    tokens = plan.steps * speed.tokens_per_step
    count = short(tokens, " ") if tokens >= 1e6 else f"{tokens:,}"
    print(f"model       {plan.parameters:,} parameters in {plan.tensors} tensors")
    print(f"layout      {_layout_text(layout)}")
    print(
        f"step        {layout.data} x {layout.accumulate} micro-batches of {layout.rows} rows ="
        f" {speed.tokens_per_step:,} tokens; {plan.steps:,} steps = {count} tokens,"
        f" {tokens / plan.parameters:.1f} per parameter"
    )
    print()
    _print_memory(plan.memory)
    print()
    print("sent by a GPU in a step")
    sent = {**plan.traffic.data, **plan.traffic.tensor, "all beta_t": plan.traffic.beta, "total": plan.traffic.total}
    for name, size in sent.items():
        print(f"  {name:<38}{_bytes(size):>10}")
    print()
    kind = "an assumed" if plan.mfu_is_assumed else "a measured" if plan.measured else "a given"
    print(
        f"speed       {speed.tokens_per_second:,.0f} tokens/s, {duration_text(speed.step_seconds)} a step,"
        f" {duration_text(speed.days * 86400)} for the run, at {kind} MFU of {plan.mfu:.3g}"
    )
    if plan.mfu_is_assumed:
        print("            no run of this shape was measured on these GPUs: measure some steps, and give --mfu")
    elif plan.measured:
        other = (plan.measured.parameters, plan.measured.gpus) != (plan.parameters, layout.gpus)
        hint = "; this is another size or number of GPUs: measure some steps, and give --mfu" if other else ""
        print(f"            measured on {plan.measured.description}{hint}")
    print(
        f"            sending takes {duration_text(speed.communication_seconds)} of a step if no computation hides it"
        f" ({args.node_bandwidth:g} GB/s within a node, {args.bandwidth:g} GB/s between nodes)"
    )
    print(f"checkpoint  {_bytes(plan.checkpoint_bytes)}: weights and the two moments")
    print(f"fits        {_verdict(plan, args)}")
    if is_gated(plan.tokenizer):
        print(f"tokenizer   {plan.tokenizer} is gated: {GATED_CURE}")


def _print_memory(memory: Memory) -> None:
    moments = list(memory.moments)
    print(f"{'memory of a GPU, during':<26}" + "".join(f"{name:>14}" for name in moments))
    for name, size in memory.held.items():
        print(f"  {name:<24}" + f"{_bytes(size):>14}" * len(moments))
    names = dict.fromkeys(name for parts in memory.moments.values() for name in parts)
    for name in names:
        sizes = [memory.moments[moment].get(name, 0) for moment in moments]
        if any(sizes):
            print((f"  {name:<24}" + "".join(f"{_bytes(size) if size else '':>14}" for size in sizes)).rstrip())
    print(f"  {'total':<24}" + "".join(f"{_bytes(memory.total(moment)):>14}" for moment in moments))


def _layout_text(layout: ParallelPlan) -> str:
    gpus = f"over {layout.gpus} GPUs"
    tensor = f"FSDP over {layout.data} x tensor parallel over {layout.tensor} = {layout.gpus} GPUs"
    kind = {
        "single": "one GPU",
        "ddp": f"DDP {gpus}",
        "fsdp": tensor if layout.tensor > 1 else f"FSDP {gpus}",
        "zero": f"DeepSpeed ZeRO {layout.stage} {gpus}",
    }[layout.kind]
    nodes = f", {layout.nodes} nodes of {layout.gpus_per_node}" if layout.nodes > 1 else ""
    return f"{kind}{nodes}, {layout.precision}"


def _verdict(plan: Plan, args: argparse.Namespace) -> str:
    name = "GPU" if args.memory_gb else args.gpu
    sums = (
        f"{_bytes(plan.memory.total(plan.memory.peak))} + {_bytes(RESERVE)} (a guess for the CUDA context, NCCL and"
        f" fragmentation) of {_bytes(plan.gpu_memory)} on each {name}"
    )
    if plan.fits:
        return f"yes: {sums}"
    static = sum(plan.memory.held.values())
    hints = ["a larger trainer.accumulate_grad_batches", "--model.activation_checkpointing true"]
    if static > plan.gpu_memory // 2:
        hints = ["ModelParallelStrategy (FSDP2) over more GPUs", *hints]
    return f"NO: {sums}. Try {', '.join(hints)}"


def duration_text(seconds: float) -> str:
    """Return three digits and the unit that suits: "4.26 days"."""
    return scaled(seconds, {"days": 86400.0, "h": 3600.0, "min": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6})


def _bytes(size: float) -> str:
    return scaled(size, {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0})
