"""TensorBoard's Custom Scalars page, with charts of the momentum that reach from 0 to the cap."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from am_lightning.loggers.images import package_of
from am_lightning.loggers.reader import StatsReader

Pages = dict[str, dict[str, list[Any]]]

_WRITTEN: WeakKeyDictionary[Any, Pages] = WeakKeyDictionary()  # of each board


def add_momentum(board: Any, reader: StatsReader, step: int, before: str = "") -> None:
    """The momentum's page, once, and the line at 0 that its charts begin at.

    Args:
        board: a ``SummaryWriter``, of torch or tensorboardX.
        step: of the scalars that ``reader`` has read.
        before: what their tags begin with: the Trainer of transformers has "train/".
    """
    add_custom_scalars(board, reader.stats.custom_scalars(before))
    for tag, value in reader.floor().items():
        board.add_scalar(f"{before}{tag}", value, step)


def add_custom_scalars(board: Any, pages: Pages) -> None:
    """As ``SummaryWriter.add_custom_scalars``; Margin charts also get the lines at 0 and at the cap of their optimizer.

    TensorBoard fits an axis to what is drawn: without them a chart of 0.77 to 0.80 looks like a storm. It shows only
    what was written last, so what this function wrote before is written with it. tensorboardX's charts have no lines.
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
