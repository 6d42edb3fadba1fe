"""The pictures, and the comparison that draws one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pretrain
import pytest
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from am_lightning.recipes.errors import RecipeError
from am_lightning.recipes.report import plot
from am_lightning.recipes.report.plot import Curve, Run, draw, read_curves

from .commands import arguments, load


@pytest.fixture
def log_dir(tmp_path: Path) -> Path:
    """Event files of a run with a dip in layer 1 at step 30 to 34, resumed once at 50."""
    rng = np.random.default_rng(0)
    for first, last in ((0, 60), (50, 100)):
        with SummaryWriter(str(tmp_path / "logs"), purge_step=first) as writer:
            for step in range(first, last):
                writer.add_scalar("train/loss", 5 * 0.98**step + rng.random() * 0.1 + first, step)
                for layer in ("embed_tokens", "layers.0", "layers.1", "layers.10", "norm", "lm_head"):
                    dips = layer == "layers.1" and 30 <= step < 35
                    writer.add_scalar(f"am/beta/layer/{layer}", 0.1 if dips else 0.8, step)
                if step % 20 == 19:
                    writer.add_scalar("val/loss", 5 * 0.98**step, step)
    return tmp_path / "logs"


def test_a_resumed_run_has_every_step_once(log_dir: Path) -> None:
    loss = read_curves(log_dir)["train/loss"]
    assert loss.steps.tolist() == list(range(1, 101))
    assert (loss.values[50:] > 49).all()  # the later one counts
    assert (loss.values[:50] < 49).all()


def test_layers_are_in_the_order_of_the_network(log_dir: Path) -> None:
    layers = plot._layers(read_curves(log_dir))
    assert layers == ["embed_tokens", "layers.0", "layers.1", "layers.10", "norm", "lm_head"]


def test_the_mean_of_a_line_is_the_line() -> None:
    curve = Curve(np.arange(100), np.arange(100.0))
    steps, values = plot._smooth(curve)
    assert steps.tolist() == curve.steps.tolist()
    assert values[5:-5] == pytest.approx(curve.values[5:-5])


def test_the_picture_shows_the_dip(log_dir: Path, tmp_path: Path) -> None:
    draw(tmp_path / "dip.png", [Run("", log_dir, 1.0)], heatmap_of=0)
    flat = tmp_path / "flat" / "logs"
    with SummaryWriter(str(flat)) as writer:
        for step in range(100):
            writer.add_scalar("train/loss", 1.0, step)
            writer.add_scalar("am/beta/layer/layers.1", 0.8, step)
    draw(tmp_path / "flat.png", [Run("", flat)], heatmap_of=0)
    assert _dark_blue(tmp_path / "dip.png") > _dark_blue(tmp_path / "flat.png") + 500


def _dark_blue(path: Path) -> int:
    """Pixels of the colours that only a low beta_t has (and the colour bar)."""
    red, green, blue = imread(path)[..., :3].transpose(2, 0, 1)
    return int(((blue > 0.4) & (red < 0.2) & (green < 0.35)).sum())


def test_a_run_without_momentum_has_losses_alone(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "logs")) as writer:
        writer.add_scalar("train/loss", 1.0, 0)
    draw(tmp_path / "one.png", [Run("", tmp_path / "logs")], heatmap_of=0)
    height, width, _ = imread(tmp_path / "one.png").shape
    assert height < width * 0.6


def test_missing_event_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"{tmp_path} holds no event file"):
        read_curves(tmp_path)


def test_the_comparison_trains_adamw_on_the_same_data(
    tmp_path: Path, corpus_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pretrain.main(arguments(tmp_path, corpus_folder, 20, "--compare", "true"))
    output = capfd.readouterr().out
    table = [line for line in output.splitlines() if line.strip().startswith(("AM-AdamW ", "AdamW 0."))]
    assert [line.split("  ")[1].strip() for line in table] == [
        "AM-AdamW",
        "AdamW 0.9, 5% warmup",
        "AdamW 0.8, 5% warmup",
    ]
    losses = [float(line.split()[-2]) for line in table]
    assert len(set(losses)) == 3
    assert imread(tmp_path / "compare.png").shape[2] in (3, 4)
    assert len(list((tmp_path / "data").iterdir())) == 1
    for beta1 in (0.9, 0.8):
        root = tmp_path / "compare" / f"adamw-{beta1}"
        curves = read_curves(root / "logs")
        assert not [tag for tag in curves if tag.startswith("am/")]
        assert curves["lr-AdamW/pg1"].values[0] == pytest.approx(1e-3)  # 5 % of 20 steps is one
        group = load(root / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"][0]
        assert tuple(group["betas"]) == (beta1, 0.95)
        assert "beta1_max" not in group
        # The same first batch and the same initial weights: the first loss is the same to the bit.
        assert curves["train/loss"].values[0] == read_curves(tmp_path / "logs")["train/loss"].values[0]
    assert not list(tmp_path.glob("compare/*/data"))
