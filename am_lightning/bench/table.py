"""What was measured as rows of numbers, and as text."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from am_lightning.bench.measure import Measured

Row = dict[str, float | str | None]


def rows_of(measured: Sequence[Measured], training_seconds: float | None) -> list[Row]:
    """One for each optimizer.

    Args:
        training_seconds: of forward and backward of a training step, where that is known.
    """
    by_name = {each.contender.name: each for each in measured}
    fused = by_name.get("AdamW fused")
    rows: list[Row] = []
    for each in measured:
        contender, same = each.contender, by_name.get(each.contender.same)
        base = fused or same
        rows.append(
            {
                "optimizer": contender.name,
                "ms": each.median * 1e3,
                "x fused": each.ratio_to(fused) if fused else None,
                "x same": each.ratio_to(same) if same else None,
                "limit": contender.bytes_moved / base.contender.bytes_moved if base else None,
                "GB/s": contender.bytes_moved / each.median / 1e9,
                "extra MiB": None if each.extra_bytes is None else each.extra_bytes / 2**20,
                "first s": each.first,
                "share": None if training_seconds is None else each.median / (training_seconds + each.median),
                "kernels": contender.kernels(),
            }
        )
    return rows


_COLUMNS = {"ms": "{:.2f}", "x fused": "{:.2f}", "x same": "{:.2f}", "limit": "{:.2f}", "GB/s": "{:.1f}"}
_COLUMNS |= {"extra MiB": "{:.1f}", "first s": "{:.2f}", "share": "{:.2%}"}

LEGEND = """\
ms         median of a step
x fused    times AdamW fused; x same: times AdamW's own single, foreach or fused. Both are medians over rounds in which
           all optimizers step in turn
(first     dot products over what a first pass reads: 1 + its "x fused" is what this machine's memory allows a step that
 pass...)  reads everything twice
limit      the ratio of the bytes that must be moved: x fused of a kernel that only memory holds up
GB/s       these bytes by the time
extra MiB  most that a step takes beyond parameters, gradients and state
first s    the first step, which builds kernels and makes the state
share      of a training step, forward and backward included"""


def text_of(rows: Sequence[Row]) -> str:
    """The table, a line for each optimizer."""
    width = max(len(str(row["optimizer"])) for row in rows) + 1
    lines = [" " * width + "".join(f"{name:>11}" for name in _COLUMNS)]
    for row in rows:
        cells = ("-" if row[name] is None else form.format(row[name]) for name, form in _COLUMNS.items())
        lines.append(f"{row['optimizer']:{width}}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def device_words(device: torch.device) -> str:
    """The hardware, and how many threads on a CPU."""
    if device.type == "cpu":
        return f"{processor()}, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def processor() -> str:
    """The CPU's name, as Linux has it; platform.processor() is empty on many machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()
