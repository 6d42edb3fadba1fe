"""Add momentum charts with an axis from 0 to the cap to TensorBoard's Custom Scalars page."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from am_lightning.loggers.images import package_of
from am_lightning.loggers.reader import StatsReader

Pages = dict[str, dict[str, list[Any]]]

_WRITTEN: WeakKeyDictionary[Any, Pages] = WeakKeyDictionary()  # pages written to each board


def add_momentum(board: Any, reader: StatsReader, step: int, before: str = "") -> None:
    """Write the momentum's page once, and the line at 0 where its charts start.

    Args:
        board: a ``SummaryWriter`` of torch or tensorboardX.
        reader: the reader of the optimizer.
        step: step of the scalars that ``reader`` has read.
        before: prefix that the framework adds to all tags: "train/" in the Trainer of transformers. Default: "".
    """
    add_custom_scalars(board, reader.stats.custom_scalars(before))
    for tag, value in reader.floor().items():
        board.add_scalar(f"{before}{tag}", value, step)


def add_custom_scalars(board: Any, pages: Pages) -> None:
    """Call ``SummaryWriter.add_custom_scalars``, and draw lines at 0 and at the optimizer's cap into Margin charts.

    TensorBoard fits an axis to its curves, so without the lines a curve from 0.77 to 0.80 would fill the whole chart.
    TensorBoard shows the last layout only, so each call also writes the pages of earlier calls. The charts of
    tensorboardX get no lines.

    Args:
        board: a ``SummaryWriter`` of torch or tensorboardX.
        pages: charts by category, as ``SummaryWriter.add_custom_scalars`` takes them.
    """
    written = _WRITTEN.setdefault(board, {})
    if pages.items() <= written.items():
        return
    written |= pages
    if package_of(board) == "tensorboardX":
        board.add_custom_scalars(written)
        return
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
    from torch.utils.tensorboard.summary import custom_scalars

    summary = custom_scalars(written)  # type: ignore[no-untyped-call]
    tensor, layout = summary.value[0].tensor, Layout()
    layout.ParseFromString(tensor.string_val[0])
    for chart in (chart for category in layout.category for chart in category.chart if chart.HasField("margin")):
        prefix = chart.margin.series[0].value.partition("/beta/")[0]
        for edge in ("floor", "cap"):
            tag = f"{prefix}/beta/{edge}"
            chart.margin.series.add(value=tag, lower=tag, upper=tag)
    tensor.string_val[0] = layout.SerializeToString()
    board._get_file_writer().add_summary(summary)
