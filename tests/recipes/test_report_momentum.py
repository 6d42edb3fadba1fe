"""The momentum in reports: lowest and highest of intervals, runs that logged less, and axes of the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import QuadMesh

from am_lightning.pretrain.commands.report.plot import report_figure
from am_lightning.pretrain.commands.report.runs import RunData, find_runs

from .pages import intervals, write_run


def run_of_layer(folder: Path, points: dict[str, dict[int, float]]) -> RunData:
    write_run(folder, {"train/loss": dict.fromkeys(range(6), 2.0)} | {f"am/beta/{tag}": p for tag, p in points.items()})
    [run] = find_runs([str(folder)])
    return run


def test_a_run_of_before_the_lowest_was_logged_has_its_means(tmp_path: Path) -> None:
    run = run_of_layer(
        tmp_path, {"layer/layers.0": {0: 0.7, 1: 0.6}, "mean": {0: 0.7, 1: 0.6}, "min": {0: 0.5, 1: 0.4}}
    )
    assert run.momentum["layers.0"].values.tolist() == pytest.approx([0.7, 0.6])
    assert not run.has_lowest and run.beta_ends is None and run.cap is None


def test_a_run_that_logged_only_means_when_it_began_keeps_them(tmp_path: Path) -> None:
    means = dict.fromkeys(range(6), 0.7)
    run = run_of_layer(tmp_path, {"layer/layers.0": means, "layer/layers.0/min": {4: 0.2, 5: 0.3}})
    assert list(run.momentum) == ["layers.0"]
    assert run.momentum["layers.0"].steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert run.momentum["layers.0"].values.tolist() == pytest.approx([0.7] * 4 + [0.2, 0.3])


def test_the_picture_has_the_momentum_from_zero_to_the_cap(tmp_path: Path) -> None:
    figure = report_figure(find_runs(intervals(tmp_path, cap=0.89)))
    [axes] = [axes for axes in figure.axes if axes.get_title("left").startswith("momentum") and axes.lines]
    assert axes.get_ylim() == pytest.approx((0, 0.89), rel=0.05)
    [band] = axes.collections
    assert list(band.get_paths()[0].get_extents().extents) == pytest.approx([2, 0.2, 6, 0.85], abs=1e-6)
    [by_layer] = [axes for axes in figure.axes if "lowest of a layer group's tensors" in axes.get_title("left")]
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
