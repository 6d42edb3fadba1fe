"""Measurements as rows of numbers, and as text."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from am_lightning.bench.models import READ

if TYPE_CHECKING:
    import torch

    from am_lightning.bench.measure import Measured

Row = dict[str, float | str | None]
BASE = "AdamW fused"
MARKS = {BASE: "base", READ: "reads"}


def rows_of(measured: Sequence[Measured], training_seconds: float | None) -> list[Row]:
    """Return a row for each optimizer, the fastest first. "mark" is set in the rows that the others are compared with.

    Args:
        measured: measured optimizers.
        training_seconds: seconds of forward and backward of a training step, or None if they are unknown.
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
x fused    time divided by that of AdamW fused; x same: by that of the same form of AdamW (default, single, foreach or
           fused). Both are medians over rounds in which all optimizers step in turn
(first     dot products over the tensors that a first pass reads: 1 + its "x fused" is the least that this machine's
 pass...)  memory allows a step that reads everything twice
limit      ratio of the bytes that must be moved: x fused of a kernel that only memory limits
GB/s       these bytes divided by the time
extra MiB  peak memory of a step beyond parameters, gradients and state
make s     seconds to create the optimizer
first s    seconds of the first step, which builds kernels and creates the state
share      share of a training step, forward and backward included"""


def cells_of(row: Row) -> list[str]:
    """Return a cell for each of COLUMNS, "-" if a value is unknown."""
    return ["-" if row[name] is None else form.format(row[name]) for name, form in COLUMNS.items()]


def text_of(rows: Sequence[Row]) -> str:
    """Return the table, a line for each optimizer, with ">" before those that the others are compared with."""
    lines = [["", *COLUMNS]]
    lines += [[f"{'>' if row['mark'] else ' '} {row['optimizer']}", *cells_of(row)] for row in rows]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        f"{name:{first}}" + "".join(f"{cell:>{width + 2}}" for cell, width in zip(cells, others, strict=True))
        for name, *cells in lines
    )


def device_words(device: torch.device) -> str:
    """Return the name of the hardware, and the number of threads on a CPU."""
    import torch

    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{processor()}, {threads} thread{'s' * (threads > 1)}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def processor() -> str:
    """Return the name of the CPU from Linux, because platform.processor() is empty on many machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()
