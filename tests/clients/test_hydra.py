"""The configuration of lightning-hydra-template with the lines of its page, Hydra itself, and a module of ours."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger

from am_lightning import AdaptiveMemory, AMAdamW
from tests.clients import block, client

pytestmark = pytest.mark.nightly("clients")

# Short versions of the template's files of these names.
CONFIGS = {
    "train.yaml": "defaults: [_self_, callbacks: default, model: mnist]\n",
    "callbacks/default.yaml": "defaults: [model_summary, _self_]\n",
    "callbacks/model_summary.yaml": "model_summary: {_target_: lightning.pytorch.callbacks.ModelSummary}\n",
    "model/mnist.yaml": """
_target_: tests.clients.test_hydra.Module
optimizer: {_target_: torch.optim.Adam, _partial_: true, lr: 0.001, weight_decay: 0.0}
scheduler: {_target_: torch.optim.lr_scheduler.ReduceLROnPlateau, _partial_: true, mode: min}
""",
}


class Module(pl.LightningModule):
    """Build the optimizer as the template does."""

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        scheduler = self.hparams.scheduler(optimizer=optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}


def fit(folder: Path, *overrides: str, **files: str) -> pl.Trainer:
    """Make two steps with what Hydra builds from the configuration."""
    hydra = client("hydra")
    instantiate = client("hydra.utils").instantiate
    for name, text in (CONFIGS | files).items():
        (folder / "configs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "configs" / name).write_text(text)
    with hydra.initialize_config_dir(str(folder / "configs"), version_base="1.3"):
        config = hydra.compose("train", overrides=list(overrides))
    callbacks = [instantiate(callback) for callback in config.callbacks.values()]
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_checkpointing": False, "log_every_n_steps": 1}
    logger = CSVLogger(folder)
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", callbacks=callbacks, logger=logger, **options)
    data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.arange(8) % 2)
    trainer.fit(instantiate(config.model), torch.utils.data.DataLoader(data, batch_size=4))
    return trainer


def override_of_the_page() -> str:
    (found,) = (word for word in block("lightning_hydra_template.md", "bash").split("'") if "_target_" in word)
    return found


def trained(trainer: pl.Trainer) -> bool:
    optimizer = trainer.optimizers[0]
    return type(optimizer) is AMAdamW and {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_the_callback_on_the_command_line(tmp_path: Path) -> None:
    trainer = fit(tmp_path, override_of_the_page())
    assert trained(trainer)
    with Path(trainer.logger.log_dir, "metrics.csv").open() as file:
        curve = [float(row["am/beta/mean"]) for row in csv.DictReader(file) if row["am/beta/mean"]]
    assert len(curve) == 2 and all(0 < beta < 0.9 for beta in curve)
    assert sum(isinstance(callback, AdaptiveMemory) for callback in trainer.callbacks) == 1
    assert trainer.lr_scheduler_configs[0].scheduler.optimizer is trainer.optimizers[0]


def test_the_callback_in_the_templates_file(tmp_path: Path) -> None:
    name = "callbacks/default.yaml"
    text = CONFIGS[name] + block("lightning_hydra_template.md", "yaml")
    assert trained(fit(tmp_path, **{name: text}))


def test_weight_decay_needs_adamw(tmp_path: Path) -> None:
    decay = (override_of_the_page(), "model.optimizer.weight_decay=0.01")
    with pytest.raises(MisconfigurationException, match=r"torch\.optim\.AdamW"):
        fit(tmp_path, *decay)
    trainer = fit(tmp_path, *decay, "model.optimizer._target_=torch.optim.AdamW")
    assert trained(trainer) and trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.01
