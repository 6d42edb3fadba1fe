"""Compare `plan` with the memory and the sent bytes of small runs under every strategy.

`python -m tests.recipes.plan_cases` measures all of them in minutes and prints the table in docs/tested.md.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from am_lightning.pretrain.commands.plan.layout import ParallelPlan
from am_lightning.pretrain.commands.plan.memory import BUCKET, memory_of
from am_lightning.pretrain.commands.plan.memory import ZERO_BUCKET as LIGHTNINGS
from am_lightning.pretrain.commands.plan.traffic import traffic_of
from am_lightning.pretrain.model.shape import LlamaShape
from tests import operator_build
from tests.recipes.plan_runs import ZERO_BUCKET
from tests.sharding.pool import Pool, pools

SHAPE = LlamaShape(
    hidden_size=384, intermediate_size=1024, num_heads=6, num_layers=6, vocab_size=8192, seq_len=128
)  # 16.9 M parameters take more memory than the processes themselves
SCRATCH = 7 << 20  # the optimizer's blocked kernel on the CPU


@dataclass(frozen=True)
class Case:
    """A run; `rows` is the size of a micro-batch, over the ranks that share a layer."""

    strategy: str  # a name of parallel_runs.strategy_of
    ranks: int
    rows: int
    accumulate: int = 1
    checkpointing: bool = False
    precision: str = "32-true"

    def __str__(self) -> str:
        words = [f"{self.strategy} on {self.ranks}", f"{self.accumulate} x {self.rows} rows", self.precision]
        return ", ".join([*words, *(["checkpointing"] if self.checkpointing else [])])

    @property
    def layout(self) -> ParallelPlan:
        kind, stage = "ddp" if self.ranks > 1 else "single", 0
        if self.strategy.startswith("zero"):
            kind, stage = "zero", int(self.strategy[4:])
        elif self.strategy.startswith(("fsdp", "tp")):
            kind = "fsdp"
        tensor = int(self.strategy.partition("tp")[2] or 1)
        return ParallelPlan(kind, stage, self.ranks, self.ranks, tensor, self.accumulate, self.rows, self.precision)


CASES = (
    Case("ddp", 2, 8),
    Case("ddp", 2, 4, accumulate=2),
    Case("ddp", 2, 8, precision="bf16-mixed"),
    Case("fsdp2", 2, 8),
    Case("fsdp2", 2, 1),
    Case("fsdp2", 2, 8, checkpointing=True, accumulate=2),
    Case("fsdp2", 4, 4, precision="bf16-mixed"),
    Case("tp2", 2, 8),
    Case("fsdp2tp2", 4, 8, checkpointing=True),
    Case("zero1", 2, 8),
    Case("zero2", 2, 8),
    Case("zero3", 2, 8),
)


@dataclass(frozen=True)
class Outcome:
    """Planned bytes, and the measured ones of each rank."""

    memory: int
    peaks: list[int]
    traffic: int
    sent: list[int]

    def errors(self) -> tuple[float, float]:
        """Return planned / measured - 1 of memory, on the rank that took most, and of traffic."""
        return self.memory / max(self.peaks) - 1, self.traffic / max(self.sent) - 1


def outcome_of(
    case: Case, pool: Pool, timeout: float = 240, *, shape: LlamaShape = SHAPE, scratch: int | None = SCRATCH
) -> Outcome:
    """Plan a case, and run it on a pool of its ranks."""
    memory = memory_of(shape, case.layout, checkpointing=case.checkpointing)
    if scratch is not None:
        memory.moments["optimizer"]["optimizer scratch"] += scratch - 8 * 4 * BUCKET  # no shard here is smaller
    for parts in (memory.held, memory.moments["backward"]):
        parts |= {name: size * ZERO_BUCKET // LIGHTNINGS for name, size in parts.items() if "reduce bucket" in name}
    sent = traffic_of(shape, case.layout, checkpointing=case.checkpointing)
    # gloo's reduce-scatter is an all-reduce.
    traffic = sum(size * (1 + name.startswith("reduce-scatter")) for name, size in (sent.data | sent.tensor).items())
    with tempfile.TemporaryDirectory() as folder:
        seen: list[dict[str, Any]] = pool.run(
            "tests.recipes.plan_runs:measure",
            timeout=timeout,
            folder=folder,
            name=case.strategy,
            rows=case.rows,
            accumulate=case.accumulate,
            precision=case.precision,
            shape={**vars(shape), "activation_checkpointing": case.checkpointing},
        )
    return Outcome(
        memory.total(memory.peak), [rank["peak"] for rank in seen], traffic + sent.beta, [rank["sent"] for rank in seen]
    )


def row(case: Case, got: Outcome) -> str:
    memory, traffic = got.errors()
    peaks = f"{min(got.peaks) / 1e6:.0f} to {max(got.peaks) / 1e6:.0f}"
    return (
        f"| {case} | {got.memory / 1e6:.0f} | {peaks} | {memory:+.1%} |"
        f" {got.traffic / 1e6:.2f} | {max(got.sent) / 1e6:.2f} | {traffic:+.1%} |"
    )


def main(wanted: list[str], start: Callable[[int], Pool]) -> None:
    print("| run | memory planned, MB | measured, by rank | | sent planned, MB | measured | |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        if not wanted or any(name in str(case) for name in wanted):
            print(row(case, outcome_of(case, start(case.ranks))), flush=True)


if __name__ == "__main__":
    os.environ.update(operator_build.variables())
    with pools() as started:
        main(sys.argv[1:], started)
