"""The callback where the default device is not the model's, except while Lightning itself makes tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from am_lightning import AdaptiveMemory
from am_lightning.optim.base import AdaptiveMemoryOptimizer
from tests.lightning.model import Regression, quiet

HOOKS = ("on_fit_start", "on_train_start", "on_train_batch_end", "teardown", "state_dict", "load_state_dict")


def under_meta(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def foreign(*args: Any, **kwargs: Any) -> Any:
        with torch.device("meta"):
            return function(*args, **kwargs)

    return foreign


class Moved(AdaptiveMemory):
    """Run each of our hooks under another default device."""


for _hook in HOOKS:
    setattr(Moved, _hook, under_meta(getattr(AdaptiveMemory, _hook)))


class Kept(pl.loggers.CSVLogger):
    """Keep what is logged."""

    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        self.seen: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append({key: value for key, value in metrics.items() if key.startswith("am/")})


def fit(callback: AdaptiveMemory, folder: Any) -> tuple[list[Tensor], list[dict[str, float]]]:
    module, logger = Regression(), Kept(folder)
    trainer = pl.Trainer(
        **quiet(max_steps=6, callbacks=[callback], gradient_clip_val=1.0, logger=logger, log_every_n_steps=2)
    )
    trainer.fit(module)
    assert isinstance(trainer.optimizers[0], AdaptiveMemoryOptimizer)
    return [p.detach() for p in module.parameters()], [seen for seen in logger.seen if seen]


def test_the_same_run_and_curves(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, curves = fit(AdaptiveMemory(), tmp_path / "plain")
    with monkeypatch.context() as patch:
        for name in ("state_dict", "momentum", "report", "current_layout", "caps"):
            patch.setattr(AdaptiveMemoryOptimizer, name, under_meta(getattr(AdaptiveMemoryOptimizer, name)))
        moved, others = fit(Moved(), tmp_path / "moved")
    assert all(torch.equal(a, b) for a, b in zip(weights, moved, strict=True))
    assert curves == others and any("am/grad_norm" in seen for seen in curves)
