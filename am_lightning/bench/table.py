"""What was measured as rows of numbers, and as text."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from am_lightning.bench.measure import Measured

Row = dict[str, float | str | None]
BASE = "AdamW fused"
READ = "(first pass: reads alone)"
MARKS = {BASE: "base", READ: "reads"}


def rows_of(measured: Sequence[Measured], training_seconds: float | None) -> list[Row]:
    """One for each optimizer, the fastest first; "mark" is set in what the others are held against.

    Args:
        training_seconds: of forward and backward of a training step, where that is known.
    """
    by_name = {each.contender.name: each for each in measured}
    fused = by_name.get(BASE)
    rows: list[Row] = []
    for each in sorted(measured, key=lambda each: each.median):
        contender, same = each.contender, by_name.get(each.contender.same)
        base, moved = fused or same, contender.bytes_moved
        least = base.contender.bytes_moved if base else None
        rows.append(
            {
                "optimizer": contender.name,
                "ms": each.median * 1e3,
                "x fused": each.ratio_to(fused) if fused else None,
                "x same": each.ratio_to(same) if same else None,
                "limit": moved / least if moved and least else None,
                "GB/s": moved / each.median / 1e9 if moved else None,
                "extra MiB": None if each.extra_bytes is None else each.extra_bytes / 2**20,
                "make s": contender.made,
                "first s": each.first,
                "share": None if training_seconds is None else each.median / (training_seconds + each.median),
                "kernels": contender.kernels(),
                "mark": MARKS.get(contender.name),
            }
        )
    return rows


COLUMNS = {"ms": "{:.2f}", "x fused": "{:.2f}", "x same": "{:.2f}", "limit": "{:.2f}", "GB/s": "{:.1f}"}
COLUMNS |= {"extra MiB": "{:.1f}", "make s": "{:.3f}", "first s": "{:.3f}", "share": "{:.2%}"}

LEGEND = """\
ms         median of a step, the fastest first
x fused    times AdamW fused; x same: times AdamW's own default, single, foreach or fused. Both are medians over rounds
           in which all optimizers step in turn
(first     dot products over what a first pass reads: 1 + its "x fused" is what this machine's memory allows a step that
 pass...)  reads everything twice
limit      the ratio of the bytes that must be moved: x fused of a kernel that only memory holds up
GB/s       these bytes by the time
extra MiB  most that a step takes beyond parameters, gradients and state
make s     making the optimizer
first s    the first step, which builds kernels and makes the state
share      of a training step, forward and backward included"""


def cells_of(row: Row) -> list[str]:
    """One for each of COLUMNS; "-" where nothing is known."""
    return ["-" if row[name] is None else form.format(row[name]) for name, form in COLUMNS.items()]


def text_of(rows: Sequence[Row]) -> str:
    """The table, a line for each optimizer; ">" before what the others are held against."""
    lines = [["", *COLUMNS]]
    lines += [[f"{'>' if row['mark'] else ' '} {row['optimizer']}", *cells_of(row)] for row in rows]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        f"{name:{first}}" + "".join(f"{cell:>{width + 2}}" for cell, width in zip(cells, others, strict=True))
        for name, *cells in lines
    )


def device_words(device: torch.device) -> str:
    """The hardware, and how many threads on a CPU."""
    import torch

    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{processor()}, {threads} thread{'s' * (threads > 1)}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def processor() -> str:
    """The CPU's name, as Linux has it; platform.processor() is empty on many machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()
