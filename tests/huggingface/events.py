"""Read what a TensorBoard event file holds."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout


def scalars_in(folder: Path) -> dict[str, dict[int, float]]:
    """Return tag -> step -> value; a tag of ours that is written twice for a step is an error."""
    found: dict[str, dict[int, float]] = {}
    for events in _files(folder):
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                steps = found.setdefault(tag, {})
                assert event.step not in steps or "am/" not in tag, f"{tag} twice at step {event.step}"
                steps[event.step] = event.value
    return found


def histograms_in(folder: Path) -> dict[str, dict[int, float]]:
    """Return tag -> step -> number of values."""
    found: dict[str, dict[int, float]] = {}
    for events in _files(folder):
        for tag in events.Tags()["histograms"]:
            found[tag] = {event.step: event.histogram_value.num for event in events.Histograms(tag)}
    return found


def pages_in(folder: Path) -> list[dict[str, dict[str, list[str]]]]:
    """Return the Custom Scalars layouts as written: page -> chart -> curves. TensorBoard shows the last one."""
    layouts = [
        Layout.FromString(event.tensor_proto.string_val[0])
        for events in _files(folder)
        if "custom_scalars__config__" in events.Tags()["tensors"]
        for event in events.Tensors("custom_scalars__config__")
    ]
    return [
        {
            page.title: {
                chart.title: [one.value for one in chart.margin.series] or list(chart.multiline.tag)
                for chart in page.chart
            }
            for page in layout.category
        }
        for layout in layouts
    ]


def _files(folder: Path) -> list[EventAccumulator]:
    paths = sorted(folder.rglob("*tfevents*"))
    assert paths, f"no event file below {folder}"
    return [EventAccumulator(str(path), {"scalars": 0, "histograms": 0}).Reload() for path in paths]
