"""TensorBoard's Custom Scalars page, with charts of the momentum that reach from 0 to the cap."""

from __future__ import annotations

from typing import Any


def add_custom_scalars(board: Any, pages: dict[str, dict[str, list[Any]]]) -> None:
    """As ``SummaryWriter.add_custom_scalars``; Margin charts also get the lines at 0 and at the cap of their optimizer.

    TensorBoard fits an axis to what is drawn: without them a chart of 0.77 to 0.80 looks like a storm.
    """
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
    from torch.utils.tensorboard.summary import custom_scalars

    summary = custom_scalars(pages)  # type: ignore[no-untyped-call]
    tensor, layout = summary.value[0].tensor, Layout()
    layout.ParseFromString(tensor.string_val[0])
    for chart in (chart for category in layout.category for chart in category.chart if chart.HasField("margin")):
        prefix = chart.margin.series[0].value.partition("/")[0]
        for edge in ("floor", "cap"):
            tag = f"{prefix}/beta/{edge}"
            chart.margin.series.add(value=tag, lower=tag, upper=tag)
    tensor.string_val[0] = layout.SerializeToString()
    board._get_file_writer().add_summary(summary)
