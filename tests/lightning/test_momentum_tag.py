"""LearningRateMonitor(log_momentum=True) logs beta_t as ``...-momentum``, as it logs beta1 of AdamW."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from am_lightning import AMSGD, AdaptiveMemory, AMAdamW
from tests.lightning.model import Regression, quiet

STEPS = 6


class Cycled(Regression):
    """OneCycleLR writes betas[0], which adaptive memory does not use."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Sgd(Regression):
    def configure_optimizers(self):
        return AMSGD(self.named_parameters(), lr=0.01, scope="tensor")


class Own(Regression):
    def configure_optimizers(self):
        return AMAdamW(self.named_parameters(), lr=0.05)


def logged(module: Regression, folder: Path, *callbacks: pl.Callback) -> tuple[LearningRateMonitor, dict]:
    logger, monitor = CSVLogger(folder), LearningRateMonitor(log_momentum=True, log_weight_decay=True)
    options = quiet(max_steps=STEPS, log_every_n_steps=1, callbacks=[*callbacks, monitor], logger=logger)
    pl.Trainer(**options).fit(module)
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    tags = [tag for tag in rows[0] if tag.endswith("-momentum")]
    return monitor, {tag: {int(r["step"]): float(r[tag]) for r in rows if r[tag]} for tag in tags}


@pytest.mark.filterwarnings("ignore:the learning rate scheduler cycles")  # test_lifecycle of tests/optim expects it
@pytest.mark.parametrize("kind", [Regression, Cycled, Sgd, Own])
def test_momentum_is_beta_of_the_group(tmp_path: Path, kind: type[Regression]) -> None:
    module = kind()
    monitor, found = logged(module, tmp_path, AdaptiveMemory())
    assert len(found) == (2 if kind is Regression else 1)
    for index, values in enumerate(found.values()):
        if kind is Regression:  # matrices, then vectors
            names = [name for name, param in module.named_parameters() if (param.ndim > 1) == (index == 0)]
        else:
            names = [name for name, _ in module.named_parameters()]
        steps = range(1, STEPS)  # read when a step begins, so it is the value of the previous step
        expected = {step: sum(module.seen[step - 1][name] for name in names) / len(names) for step in steps}
        assert values == pytest.approx(expected, abs=1e-6)
    assert {v for k, v in monitor.last_momentum_values.items() if k in found} == {v[STEPS - 1] for v in found.values()}


def test_the_device_is_read_once_for_all_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is read once per shown step and optimizer."""
    reads: list[AMAdamW] = []
    report = AMAdamW.report
    monkeypatch.setattr(AMAdamW, "report", lambda self: (reads.append(self), report(self))[1])
    counts = []
    for monitored in (True, False):
        reads.clear()
        callback = AdaptiveMemory(log_every_n_steps=STEPS + 1)
        monitors = [LearningRateMonitor(log_momentum=True)] if monitored else []
        options = quiet(max_steps=STEPS, log_every_n_steps=1, callbacks=[callback, *monitors])
        pl.Trainer(**options | {"logger": CSVLogger(tmp_path)}).fit(Regression())
        counts.append(len(reads))
    assert counts[0] - counts[1] == STEPS


def test_of_others_it_is_as_before(tmp_path: Path) -> None:
    """Without the callback, and for an optimizer that is not converted, the tag stays as before."""

    class Two(Regression):
        automatic_optimization = False

        def configure_optimizers(self):
            return [
                torch.optim.AdamW(self.net[:3].parameters(), lr=0.02),
                torch.optim.SGD(self.net[3:].parameters(), lr=0.01, momentum=0.7),
            ]

        def training_step(self, batch, batch_idx) -> None:
            self.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

    _, plain = logged(Regression(), tmp_path / "plain")
    assert [set(values.values()) for values in plain.values()] == [{0.9}, {0.9}]
    _, found = logged(Two(), tmp_path / "two", AdaptiveMemory())
    assert set(found["lr-SGD-momentum"].values()) == {0.7}
    assert not {0.9, 0.89} & set(list(found["lr-AMAdamW-momentum"].values())[1:])
