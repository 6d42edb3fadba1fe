"""What a plan says of a run."""

from __future__ import annotations

import dataclasses
from typing import Any

from am_lightning.pretrain.commands.plan.layout import ParallelPlan
from am_lightning.pretrain.commands.plan.measured import Measured
from am_lightning.pretrain.commands.plan.memory import RESERVE, Memory
from am_lightning.pretrain.commands.plan.speed import Speed
from am_lightning.pretrain.commands.plan.traffic import Traffic


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes; bytes, unless a name says otherwise."""

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
        """The peak and the reserve."""
        return self.memory.total(self.memory.peak) + RESERVE

    @property
    def fits(self) -> bool:
        return self.needed <= self.gpu_memory


def checkpoint_bytes(parameters: int, layout: ParallelPlan) -> int:
    """Weights and two moments, as they are stored; DeepSpeed adds its 16-bit weights to the float32 ones."""
    if layout.kind == "zero":
        return parameters * (12 + (2 if layout.compute_bytes == 2 else 0))
    return 3 * layout.weight_bytes * parameters


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    moments = {name: plan.memory.total(name) for name in plan.memory.moments}
    return {
        **dataclasses.asdict(plan),
        "layout": {**dataclasses.asdict(plan.layout), "data": plan.layout.data, "nodes": plan.layout.nodes},
        "memory": {**dataclasses.asdict(plan.memory), "totals": moments, "peak": moments[plan.memory.peak]},
        "traffic": {**dataclasses.asdict(plan.traffic), "total": plan.traffic.total},
        "reserve": RESERVE,
        "needed": plan.needed,
        "fits": plan.fits,
    }
