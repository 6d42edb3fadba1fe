"""Event files, and the pictures drawn from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from am_lightning.pretrain.commands.report.charts import heatmap, smooth, thin
from am_lightning.pretrain.commands.report.events import Curve
from am_lightning.pretrain.commands.report.plot import look, report_figure, save
from am_lightning.pretrain.commands.report.runs import RunData

from .pages import read_curves

LAYERS = ["tok", "layers.0", "layers.1", "layers.10", "ln_f", "lm_head"]


@pytest.fixture
def log_dir(tmp_path: Path) -> Path:
    """Return event files of a run with a dip in layer 1 at step 30 to 34, resumed once at 50."""
    rng = np.random.default_rng(0)
    for first, last in ((0, 60), (50, 100)):
        with SummaryWriter(str(tmp_path / "logs"), purge_step=first, filename_suffix=f".{first:03d}") as writer:
            for step in range(first, last):
                writer.add_scalar("train/loss", 5 * 0.98**step + rng.random() * 0.1 + first, step)
                for layer in LAYERS:
                    dips = layer == "layers.1" and 30 <= step < 35
                    writer.add_scalar(f"am/beta/layer/{layer}/min", 0.1 if dips else 0.8, step)
                if step % 20 == 19:
                    writer.add_scalar("val/loss", 5 * 0.98**step, step)
    return tmp_path / "logs"


def run_of(log_dir: Path) -> RunData:
    return RunData("", log_dir.parent, {}, read_curves(log_dir))


def test_a_resumed_run_has_every_step_once(log_dir: Path) -> None:
    loss = read_curves(log_dir)["train/loss"]
    assert loss.steps.tolist() == list(range(1, 101))
    assert (loss.values[50:] > 49).all()  # the later one counts
    assert (loss.values[:50] < 49).all()


def test_a_resume_takes_back_all_that_came_after_it(tmp_path: Path) -> None:
    """This includes a curve that the resumed run has not reached yet, also without purge_step."""
    for number, (first, last) in enumerate([(0, 60), (50, 55)]):
        with SummaryWriter(str(tmp_path), filename_suffix=f".{number}") as writer:
            for step in range(first, last):
                writer.add_scalar("train/loss", number, step)
                if step in (19, 39, 59):
                    writer.add_scalar("val/loss", number, step)
    curves = read_curves(tmp_path)
    assert curves["train/loss"].steps.tolist() == list(range(1, 56))
    assert curves["val/loss"].steps.tolist() == [20, 40]


def test_layers_are_in_the_order_of_the_model_whatever_they_are_called(log_dir: Path) -> None:
    assert heatmap(run_of(log_dir).momentum)["rows"] == LAYERS


def test_the_mean_of_a_line_is_the_line() -> None:
    curve = Curve(np.arange(100), np.arange(100.0))
    mean = smooth(curve)
    assert mean.steps.tolist() == curve.steps.tolist()
    assert mean.values[5:-5] == pytest.approx(curve.values[5:-5])


def test_one_bad_step_leaves_the_mean_of_the_others() -> None:
    values = np.ones(100)
    values[40] = np.nan
    assert smooth(Curve(np.arange(100), values)).values == pytest.approx(np.ones(99))


def test_a_thinned_curve_has_its_ends_and_its_spikes() -> None:
    values = np.linspace(1, 2, 10_000)
    values[4321] = 7
    short = thin(Curve(np.arange(10_000), values), 100)
    assert short.steps[[0, -1]].tolist() == [0, 9999]
    assert 90 < len(short.steps) <= 102
    assert short.steps[short.values.argmax()] == 4321
    assert (np.diff(short.steps) > 0).all()


def test_a_column_of_the_heatmap_has_the_lowest_of_its_steps() -> None:
    values = np.full(1000, 0.8)
    values[503] = 0.1
    found = heatmap({"layers.0": Curve(np.arange(1, 1001), values)}, columns=100)
    assert found["width"] == 10
    assert found["values"] == [[0.8] * 50 + [0.1] + [0.8] * 49]
    assert [found["edges"][column] for column in (0, 50, 51, 100)] == [0, 500, 510, 1000]


def test_the_picture_shows_the_dip(log_dir: Path, tmp_path: Path) -> None:
    save(report_figure([run_of(log_dir)], curves=False), tmp_path / "dip.png")
    flat = tmp_path / "flat" / "logs"
    with SummaryWriter(str(flat)) as writer:
        for step in range(100):
            writer.add_scalar("train/loss", 1.0, step)
            writer.add_scalar("am/beta/layer/layers.1/min", 0.8, step)
    save(report_figure([run_of(flat)], curves=False), tmp_path / "flat.png")
    assert _dark(tmp_path / "dip.png") > _dark(tmp_path / "flat.png") + 500


def _dark(path: Path) -> int:
    """Return the pixels of the colours that only a low beta_t has (and the colour bar)."""
    red, green, blue = imread(path)[..., :3].transpose(2, 0, 1)
    return int(((blue > red + 0.05) & (red < 0.3) & (green < 0.15)).sum())


def test_a_run_without_momentum_has_losses_alone(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "logs")) as writer:
        writer.add_scalar("train/loss", 1.0, 0)
    save(report_figure([run_of(tmp_path / "logs")], curves=False), tmp_path / "one.png")
    height, width, _ = imread(tmp_path / "one.png").shape
    assert height < width * 0.6


def test_many_runs_can_be_told_apart() -> None:
    assert len({look(number) for number in range(24)}) == 24
