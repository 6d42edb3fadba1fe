"""A run's logs besides its momentum, its progress bar, and its other pages in TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pretrain
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from am_lightning.pretrain.callbacks.throughput import TrainingMonitor, perplexity
from am_lightning.pretrain.commands.report.events import PATTERN, Curve

from .commands import arguments, run
from .pages import read_curves

ADAMW = ["--model.optimizer", "torch.optim.AdamW", "--trainer.callbacks", "null"]
FSDP2 = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},  # Lightning's default is the other way round
}


def fit(root: Path, corpus: Path, steps: int, *extra: str) -> dict[str, Curve]:
    pretrain.main(arguments(root, corpus, steps, *extra))
    return read_curves(root / "logs")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path) -> Path:
    root = tmp_path_factory.mktemp("watched")
    pretrain.main(arguments(root, corpus_folder, 8, "--monitor.peak_flops", "2e12"))
    return root


def test_scalars_of_the_training(watched: Path) -> None:
    curves = read_curves(watched / "logs")
    loss = curves["train/loss"].values
    assert curves["train/perplexity"].values == pytest.approx([perplexity(v) for v in loss], rel=1e-5)
    assert curves["throughput/tokens"].values.tolist() == [8 * 32 * step for step in range(1, 9)]
    assert (curves["throughput/tokens_per_second"].values > 0).all()
    flops = curves["throughput/tflops_per_device"].values * 1e12
    per_token = flops / curves["throughput/tokens_per_second"].values
    # 6 N + 12 L h s: 37 024 parameters without the embedding's 8 192; 2 layers, 32 wide, 32 tokens.
    assert per_token == pytest.approx([6 * (37024 - 8192) + 12 * 2 * 32 * 32] * 8, rel=1e-4)
    assert curves["throughput/mfu"].values == pytest.approx(flops / 2e12, rel=1e-4)
    assert "train/grad_norm" not in curves  # am/grad_norm is there
    assert len(curves["am/grad_norm"].values) == 8


def test_a_cpu_has_no_known_peak(tmp_path: Path, corpus_folder: Path) -> None:
    curves = fit(tmp_path, corpus_folder, 4, "--trainer.log_every_n_steps", "2")
    assert "throughput/mfu" not in curves and len(page_of(tmp_path)[1]["throughput"]) == 2
    assert list(page_of(tmp_path)[1]) == ["training", "throughput", "adaptive momentum (am)"]  # it logs after a step
    assert curves["train/loss"].steps.tolist() == curves["throughput/tokens"].steps.tolist() == [2, 4]


@pytest.mark.parametrize("extra", [ADAMW, [*ADAMW, "--trainer.gradient_clip_val", "null"], []], ids=lambda e: len(e))
def test_every_optimizer_has_a_gradient_norm(tmp_path: Path, corpus_folder: Path, watched: Path, extra: Any) -> None:
    """The norm before clipping is logged, with and without clipping. All optimizers have the same first gradient."""
    extra = extra or ["--trainer.gradient_clip_val", "null"]
    found = fit(tmp_path, corpus_folder, 2, *extra)["train/grad_norm"].values
    assert found[0] == pytest.approx(read_curves(watched / "logs")["am/grad_norm"].values[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", json.dumps(FSDP2)], ids=["ddp", "fsdp2"])
def test_loss_and_norm_are_of_the_whole_step(tmp_path: Path, corpus_folder: Path, strategy: str) -> None:
    """Two processes with two micro-batches each log what one process with one batch logs."""
    extra = [*ADAMW, "--model.optimizer.init_args.lr", "1e-3"]
    alone = fit(tmp_path / "one", corpus_folder, 4, *extra)
    many = ["--trainer.devices", "2", "--trainer.accumulate_grad_batches", "2", "--trainer.strategy", strategy]
    result = run(arguments(tmp_path / "two", corpus_folder, 4, *extra, *many), tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    two = read_curves(tmp_path / "two" / "logs")
    for tag in ("train/loss", "train/grad_norm", "throughput/tokens"):
        assert two[tag].steps.tolist() == [1, 2, 3, 4]
        assert two[tag].values == pytest.approx(alone[tag].values, rel=1e-4), tag


@pytest.mark.slow
@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_the_bar_has_the_figures(
    tmp_path: Path, corpus_folder: Path, capfd: pytest.CaptureFixture[str], bar: str
) -> None:
    pytest.importorskip(bar)
    fit(tmp_path, corpus_folder, 12, "--trainer.enable_progress_bar", "true", "--progress_bar", bar)
    written = "".join(capfd.readouterr())
    mark = "=" if bar == "tqdm" else ":"
    for name in ("loss", "val", "tok/s", "beta"):
        assert f"{name}{mark}" in written.replace(" ", ""), written[-600:]
    assert "v_num" not in written and "train/loss" not in written


def test_a_bar_for_adamw_has_no_beta(tmp_path: Path, corpus_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, corpus_folder, 3, *ADAMW, "--trainer.enable_progress_bar", "true")
    written = "".join(capfd.readouterr())
    assert "tok/s=" in written and "beta=" not in written


@pytest.mark.parametrize(
    ("argument", "value"), [("window_size", 0), ("peak_flops", 0.0), ("peak_flops", float("inf")), ("peak_flops", -1.0)]
)
def test_wrong_settings_are_refused(argument: str, value: float) -> None:
    with pytest.raises(Exception, match=rf"monitor\.{argument} is {value!r}; allowed"):
        TrainingMonitor(**{argument: value})


# ------------------------------------------------------------------ pages of TensorBoard
def events_of(root: Path) -> EventAccumulator:
    events = EventAccumulator(str(root / "logs"))
    events.Reload()
    return events


def test_the_hparams_page_has_one_row_for_the_run(watched: Path) -> None:
    assert {path.parent for path in watched.rglob(PATTERN)} == {watched / "logs"}  # no stray run beside it
    content = events_of(watched).PluginTagToContent("hparams")
    parts = {tag: HParamsPluginData.FromString(data) for tag, data in content.items()}
    settings = parts["_hparams_/session_start_info"].session_start_info.hparams
    numbers = {"lr": 2e-3, "beta1": 0.8, "beta2": 0.95, "lambd": 0.1, "batch_size": 8, "max_steps": 8, "processes": 1}
    assert {name: settings[name].number_value for name in numbers} == pytest.approx(numbers)
    assert settings["parameters"].number_value == 37024
    words = {"optimizer": "AMAdamW", "scope": "tensor", "precision": "32-true"}
    assert {name: settings[name].string_value for name in words} == words
    results = [info.name.tag for info in parts["_hparams_/experiment"].experiment.metric_infos]
    assert results[0] == "final/val_loss" and set(results) <= set(read_curves(watched / "logs"))


def test_the_configuration_is_a_text_card(watched: Path) -> None:
    [event] = events_of(watched).Tensors("config/text_summary")
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    assert all(line.startswith("    ") for line in lines)  # Markdown keeps it as it is
    card = yaml.safe_load("\n".join(line[4:] for line in lines))
    assert card["model"]["hidden_size"] == 32
    assert card == yaml.safe_load((watched / "logs" / "config.yaml").read_text())


def page_of(root: Path) -> tuple[Layout, dict[str, list[str]]]:
    """Return the newest layout that TensorBoard shows, and the titles."""
    layout = Layout.FromString(events_of(root).Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    return layout, {category.title: [chart.title for chart in category.chart] for category in layout.category}


def test_the_custom_scalars_page_overlays_what_belongs_together(watched: Path) -> None:
    layout, charts = page_of(watched)
    assert charts["training"][0] == "loss" and "tokens per second, all processes" in charts["throughput"]
    assert charts["adaptive momentum (am)"][:2] == ["beta_t of all tensors", "beta_t of attn.qkv"]
    [momentum] = [chart for category in layout.category for chart in category.chart if chart.title.endswith("tensors")]
    series = [(one.value, one.lower, one.upper) for one in momentum.margin.series]
    edges = [(f"am/beta/{edge}",) * 3 for edge in ("floor", "cap")]  # they extend the axis
    assert series == [("am/beta/mean", "am/beta/min", "am/beta/max"), *edges]
    assert {tag for one in series for tag in one} <= set(events_of(watched).Tags()["scalars"])
