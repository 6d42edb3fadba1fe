"""The momentum in reports: lowest and highest of intervals, runs that logged less, and axes of the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import QuadMesh

from am_lightning.pretrain.commands.report.charts import charts
from am_lightning.pretrain.commands.report.plot import COLOURS, report_figure
from am_lightning.pretrain.commands.report.runs import RunData, find_runs

from .pages import intervals, write_run


def run_of_layer(folder: Path, points: dict[str, dict[int, float]]) -> RunData:
    write_run(folder, {"train/loss": dict.fromkeys(range(6), 2.0)} | {f"am/beta/{tag}": p for tag, p in points.items()})
    [run] = find_runs([str(folder)])
    return run


def test_the_momentum_of_a_layer_is_its_lowest(tmp_path: Path) -> None:
    means, lowest = {0: 0.7, 1: 0.6}, {0: 0.5, 1: 0.4}
    tags = {"layer/layers.0": means, "layer/layers.0/min": lowest, "mlp": means, "mlp/min": {0: 0.2, 1: 0.3}}
    run = run_of_layer(tmp_path, {**tags, "mean": means, "min": lowest})
    assert list(run.momentum) == ["layers.0"]
    assert run.momentum["layers.0"].values.tolist() == pytest.approx([0.5, 0.4])
    assert run.beta_ends is None and run.cap is None


def test_the_picture_has_the_charts_of_the_page(tmp_path: Path) -> None:
    for number in range(2):
        scalars = {"train/loss": {0: 3.0, 1: 2.0 + number}, "val/loss": {1: 2.5}, "throughput/mfu": {0: 0.4, 1: 0.4}}
        write_run(tmp_path / str(number), scalars)
    runs = find_runs([str(tmp_path)])
    losses, *others = report_figure(runs).axes
    titles = [f"{chart['title']}, {chart['unit']}" for chart in charts(runs) if chart["id"] != "loss"]
    assert [axes.get_title("left") for axes in others] == titles and len(titles) == 2
    perplexity, mfu = others
    assert perplexity.get_yscale() == "log" and mfu.get_ylim()[0] == 0
    assert losses.get_ylim()[1] == pytest.approx(3.0)  # the highest running mean after 5 % of a run
    assert [line.get_color() for line in mfu.lines] == list(COLOURS[:2])


def test_the_picture_has_the_momentum_from_zero_to_the_cap(tmp_path: Path) -> None:
    figure = report_figure(find_runs(intervals(tmp_path, cap=0.89)))
    [axes] = [axes for axes in figure.axes if axes.get_title("left").startswith("Momentum, mean")]
    assert axes.get_ylim() == pytest.approx((0, 0.89), rel=0.05)
    [band] = axes.collections
    assert list(band.get_paths()[0].get_extents().extents) == pytest.approx([2, 0.2, 6, 0.85], abs=1e-6)
    [by_layer] = [axes for axes in figure.axes if "tensors, by layer group" in axes.get_title("left")]
    [mesh] = by_layer.collections
    assert isinstance(mesh, QuadMesh)
    assert np.asarray(mesh.get_coordinates())[0, :, 0].tolist() == [0, 2, 4, 6]  # the first point covers two steps, too
    assert mesh.get_clim() == pytest.approx((0, 0.89))


def test_the_validation_after_the_last_step_is_one_dot(tmp_path: Path) -> None:
    run = run_of_layer(tmp_path, {})
    assert run.validation_points == []
    write_run(tmp_path, {"final/val_loss": {6: 1.5}})
    [run] = find_runs([str(tmp_path)])
    assert run.validation_points == [(6, 1.5)]
