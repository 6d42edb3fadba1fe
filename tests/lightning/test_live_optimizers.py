"""Optimizers rebuilt during a run: the Trainer continues with them, and so do adaptive memory and its curves."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger

from am_lightning import AdaptiveMemory, AMAdamW
from tests.lightning.model import Regression, batch_of, quiet

STEPS, AGAIN, BAD = 9, 4, 2


def fresh(module: pl.LightningModule) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=0.02, betas=(0.8, 0.95))


def set_up_again(module: pl.LightningModule) -> None:
    module.trainer.strategy.setup_optimizers(module.trainer)


def assigned(module: pl.LightningModule) -> None:
    module.trainer.optimizers = [fresh(module)]


def put_into_the_list(module: pl.LightningModule) -> None:
    module.trainer.optimizers[0] = fresh(module)


def behind_the_strategy(module: pl.LightningModule) -> None:
    module.trainer.strategy._optimizers = [fresh(module)]


WAYS = {way.__name__: way for way in (set_up_again, assigned, put_into_the_list, behind_the_strategy)}


class Again(Regression):
    """Rebuild the optimizer before a step or inside it; the gradient of an earlier step is not finite."""

    def __init__(self, way: Callable[[Any], None] | None, hook: str = "on_train_batch_start") -> None:
        super().__init__()
        self.way, self.hook = way, hook
        self.stepped: list[tuple[Any, bool]] = []

    def meet(self, hook: str, batch_idx: int) -> None:
        if self.way and hook == self.hook and batch_idx == AGAIN:
            self.way(self)

    def on_train_batch_start(self, batch, batch_idx) -> None:
        self.before = [p.detach().clone() for p in self.parameters()]
        self.meet("on_train_batch_start", batch_idx)

    def training_step(self, batch, batch_idx):
        self.meet("training_step", batch_idx)
        return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == BAD else 1.0)

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        moved = not all(map(torch.equal, self.before, self.parameters()))
        self.stepped.append((self.trainer.optimizers[0], moved))
        self.meet("on_train_batch_end", batch_idx)


def rows(folder: Path) -> dict[int, dict[str, float]]:
    with open(folder / "metrics.csv") as file:
        found = list(csv.DictReader(file))
    logged = [row for row in found if row.get("am/beta/mean")]
    return {int(row["step"]): {tag: float(text) for tag, text in row.items() if text} for row in logged}


@pytest.mark.filterwarnings("ignore:am. 1 step since the last report dropped")
@pytest.mark.parametrize("hook", ["on_train_batch_start", "training_step", "on_train_batch_end"])
@pytest.mark.parametrize("way", WAYS)
def test_the_successor_is_converted_trained_and_shown(tmp_path: Path, way: str, hook: str) -> None:
    module, logger = Again(WAYS[way], hook), CSVLogger(tmp_path)
    trainer = pl.Trainer(**quiet(max_steps=STEPS, log_every_n_steps=1, callbacks=[AdaptiveMemory()], logger=logger))
    trainer.fit(module)
    last = trainer.optimizers[0]
    assert type(last) is AMAdamW and last is not module.stepped[0][0]
    made = STEPS - AGAIN - (hook != "on_train_batch_start")
    late = way in ("put_into_the_list", "behind_the_strategy") and hook == "on_train_batch_start"
    assert {float(state["step"]) for state in last.state.values()} == {made - late}  # recorded at the batch's end
    assert [moved for _, moved in module.stepped] == [step != BAD for step in range(STEPS)]
    if way != "set_up_again":
        assert last.param_groups[0]["beta1_max"] == pytest.approx(0.78)
    logged = rows(Path(logger.log_dir))
    shown = [step for step in range(STEPS) if module.seen[step]["net.0.weight"] >= 0]  # the steps of the new optimizer
    assert {*shown} - {BAD} <= set(logged) <= {*shown, AGAIN} - {BAD}  # the old optimizer's reading, without a beta_t
    assert AGAIN in logged or hook != "on_train_batch_end"
    for step, row in logged.items():
        if step in shown:
            assert row["am/beta/mean"] == pytest.approx(sum(module.seen[step].values()) / 8, abs=1e-6)
        assert row["am/skipped_steps"] == (step >= BAD)  # the count continues across the change


@pytest.mark.parametrize("way", [set_up_again, assigned])
def test_of_adamw_the_successor_is_trained_too(way) -> None:
    module = Again(way)
    trainer = pl.Trainer(**quiet(max_steps=STEPS))
    trainer.fit(module)
    assert {float(state["step"]) for state in trainer.optimizers[0].state.values()} == {STEPS - AGAIN}


def with_sgd(module: pl.LightningModule) -> None:
    module.trainer.optimizers = [torch.optim.SGD(module.parameters(), lr=0.1)]


def with_one_that_has_stepped(module: pl.LightningModule) -> None:
    optimizer = fresh(module)
    optimizer.step()
    for param in module.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    module.trainer.optimizers = [optimizer]


@pytest.mark.parametrize(
    ("way", "text"), [(with_sgd, "nothing to convert.*am_sgd"), (with_one_that_has_stepped, "has state already")]
)
def test_a_successor_that_cannot_be_converted_is_refused(way, text: str) -> None:
    with pytest.raises(MisconfigurationException, match=text):
        pl.Trainer(**quiet(max_steps=STEPS, callbacks=[AdaptiveMemory()])).fit(Again(way))


def test_wrappers_of_before_are_taken_off(tmp_path: Path) -> None:
    """``self.optimizers()`` returns Lightning's wrapper; one around an AdamW still passes for AdamW."""

    def by_hand(module) -> None:
        kept = module.optimizers()
        module.trainer.optimizers = [type(kept).__mro__[1](fresh(module))]

    module = Again(by_hand)
    trainer = pl.Trainer(**quiet(max_steps=STEPS, callbacks=[AdaptiveMemory()]))
    trainer.fit(module)
    assert type(trainer.optimizers[0]) is AMAdamW
    assert isinstance(module.optimizers(), AMAdamW)


class Adversaries(Regression):
    """Two optimizers, the second of which is rebuilt and later removed."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        halves = self.net[:3], self.net[3:]
        return [torch.optim.AdamW(half.parameters(), lr=0.02) for half in halves]

    def on_train_batch_start(self, batch, batch_idx) -> None:
        first, *_ = self.trainer.optimizers
        if batch_idx == 3:
            self.trainer.optimizers = [first, torch.optim.AdamW(self.net[3:].parameters(), lr=0.01)]
        if batch_idx == 6:
            self.trainer.optimizers = [first]

    def training_step(self, batch, batch_idx) -> None:
        x, y = batch_of(batch_idx)
        loss = torch.nn.functional.mse_loss(self.net(x), y)
        self.zero_grad()
        self.manual_backward(loss)
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()


def test_one_of_two_is_made_again_and_goes(tmp_path: Path) -> None:
    module, logger = Adversaries(), CSVLogger(tmp_path)
    trainer = pl.Trainer(
        **quiet(
            max_epochs=1, limit_train_batches=STEPS, log_every_n_steps=1, logger=logger, callbacks=[AdaptiveMemory()]
        )
    )
    trainer.fit(module)
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        found = list(csv.DictReader(file))
    counts = [sum(bool(row.get(f"{prefix}/beta/mean")) for row in found) for prefix in ("am", "am-1")]
    assert counts == [STEPS, 6]
    assert {float(state["step"]) for state in trainer.optimizers[0].state.values()} == {STEPS}


class Growing(Again):
    """Add a layer during the run, in a group of its own."""

    def __init__(self) -> None:
        super().__init__(Growing.grow)

    def grow(self) -> None:
        self.more = torch.nn.Linear(1, 1)
        self.trainer.optimizers[0].add_param_group({"params": list(self.more.parameters())})

    def configure_optimizers(self):
        return fresh(self)  # torch's schedulers refuse an additional group

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + self.more(torch.ones(1, 1)).pow(2).sum() if hasattr(self, "more") else loss


def test_a_layer_that_is_added_has_its_name() -> None:
    module = Growing()
    pl.Trainer(**quiet(max_steps=STEPS, callbacks=[AdaptiveMemory()])).fit(module)
    assert {"more.weight", "more.bias"} == set(module.seen[-1]) - set(module.seen[0])
    assert all(beta >= 0 for beta in module.seen[-1].values())


def test_folds_in_one_trainer(tmp_path: Path) -> None:
    """Each fit rebuilds its optimizer; the curves continue in the same logger with those of the new one."""
    logger = CSVLogger(tmp_path)
    trainer = pl.Trainer(**quiet(max_epochs=1, log_every_n_steps=1, callbacks=[AdaptiveMemory()], logger=logger))
    seen, made = [], []
    for fold in range(3):
        module = Regression(batches=3)
        trainer.fit_loop.max_epochs = fold + 1
        trainer.fit(module)
        seen += module.seen
        made.append(trainer.optimizers[0])
    assert [type(optimizer) for optimizer in made] == [AMAdamW] * 3 and len(set(map(id, made))) == 3
    logged = rows(Path(logger.log_dir))
    assert sorted(logged) == list(range(9)) and len(seen) == 9
    for step, row in logged.items():
        assert row["am/beta/mean"] == pytest.approx(sum(seen[step].values()) / 8, abs=1e-6)
