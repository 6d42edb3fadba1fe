"""`--compare true`: train AdamW from the same seed on the same data after a finished AM run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from am_lightning.pretrain.callbacks.throughput import perplexity
from am_lightning.pretrain.commands.report.plot import report_figure, save
from am_lightning.pretrain.commands.report.summary import RunResult

BASELINES = (0.9, 0.8)  # their beta1
WARMUP_FRACTION = 0.05  # their warmup, which is usual for AdamW; or the run's own, if that is longer


def compare(ours: RunResult, config: dict[str, Any], run: Callable[[dict[str, Any]], Any]) -> None:
    """Train the baselines below `DIR/compare/`, print the table, draw `DIR/compare.png`.

    Args:
        ours: the finished run.
        config: its resolved configuration of `fit`.
        run: trains from a configuration, on every process, and returns the PretrainCLI.
    """
    classes = [config["model"]["optimizer"], *(config["trainer"].get("callbacks") or [])]
    is_am = any(each["class_path"].split(".")[-1] in ("AMAdamW", "AdaptiveMemory") for each in classes)
    results = {"AM-AdamW" if is_am else "this run": ours}
    warmup = max(WARMUP_FRACTION, config["model"]["warmup_fraction"])
    for beta1 in BASELINES:
        baseline = run(_baseline_config(config, beta1, warmup, ours.root / "compare" / f"adamw-{beta1}"))
        results[f"AdamW {beta1}, {warmup:.0%} warmup"] = baseline.result
    _report(ours.root / "compare.png", results)


def _baseline_config(config: dict[str, Any], beta1: float, warmup: float, root: Path) -> dict[str, Any]:
    """Return the configuration with torch.optim.AdamW. Only optimizer, warmup and folders differ."""
    config = copy.deepcopy(config)
    config.pop("config", None)
    data, trainer = config["data"], config["trainer"]
    options = config["model"]["optimizer"].get("init_args", {})
    betas = options.get("betas") or (None, 0.95)
    config["model"]["optimizer"] = {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": options.get("lr", 1e-3), "betas": [beta1, betas[1]], "eps": options.get("eps", 1e-8)},
    }
    config["model"]["warmup_fraction"] = warmup
    # The AdaptiveMemory callback would turn AdamW into AMAdamW.
    callbacks = trainer.get("callbacks") or []
    trainer["callbacks"] = [c for c in callbacks if not c["class_path"].endswith("AdaptiveMemory")]
    data["cache_dir"] = data["cache_dir"] or str(Path(trainer["default_root_dir"], "data"))
    trainer["default_root_dir"] = str(root)
    config["checkpoint"]["dirpath"] = None
    if config["ckpt_path"] != "last":  # a checkpoint of the AM run is no beginning for a baseline
        config["ckpt_path"] = None
    config["compare"] = False
    return config


@rank_zero_only
def _report(path: Path, results: dict[str, RunResult]) -> None:
    width = max(map(len, results))
    print(f"  {'':<{width}}  validation loss  perplexity")
    for name, result in results.items():
        print(f"  {name:<{width}}  {result.val_loss:>15.4f}  {perplexity(result.val_loss):>10.2f}")
    drawn = [run for name, result in results.items() if (run := result.drawn_as(name))]
    if drawn:
        save(report_figure(drawn, curves=False), path)
        print(f"\n  picture           {path}\n", flush=True)
