"""One run of the vision study."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from am_lightning import am_adamw, am_sgd
from am_lightning.optim.param_groups import parameter_groups
from recipes.studies.ledger import Config, Result
from recipes.studies.vision.images import Images, load_images
from recipes.studies.vision.networks import NETWORKS


@dataclass(frozen=True)
class Method:
    """An optimizer with all its settings except the learning rate.

    Attributes:
        kind: "sgd", "nesterov", "am_sgd", "adamw" or "am_adamw".
        momentum: fixed momentum, or the cap of AM.
    """

    kind: str
    momentum: float

    def __str__(self) -> str:
        names = {"sgd": "SGD", "nesterov": "Nesterov", "am_sgd": "AM-SGD", "adamw": "AdamW", "am_adamw": "AM-AdamW"}
        return f"{names[self.kind]} {self.momentum:g}"

    @property
    def is_sgd(self) -> bool:
        return self.kind in ("sgd", "nesterov", "am_sgd")

    def make(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return the optimizer. SGD has AM's averaged form (dampening = momentum), so learning rates are comparable."""
        if self.kind == "am_sgd":
            return am_sgd(model, lr, weight_decay, beta_max=self.momentum)
        if self.kind == "am_adamw":
            return am_adamw(model, lr, weight_decay, betas=(self.momentum, 0.999))
        groups = parameter_groups(model, weight_decay)
        if self.kind == "adamw":
            return torch.optim.AdamW(groups, lr, (self.momentum, 0.999))
        if self.kind == "nesterov":  # torch allows no dampening here, so the learning rate has the factor
            return torch.optim.SGD(groups, lr * (1 - self.momentum), self.momentum, nesterov=True)
        return torch.optim.SGD(groups, lr, self.momentum, dampening=self.momentum)


def classify(data_dir: Path | None, max_steps: int | None, config: Config) -> Result:
    """Train and score a configuration ``{"task", "method", "lr", "seed", "device"}``.

    Args:
        data_dir: folder of CIFAR's unpacked archives.
        max_steps: steps after which a trial of a long task ends. None: all steps.
        config: configuration of the run.

    Returns:
        ``test_error`` in percent after training (None if the run diverged) and the ``losses`` of the batches.
    """
    task, method = config["task"], Method(**config["method"])
    device = torch.device(config["device"])
    images = load_images(task["data"], data_dir)
    torch.manual_seed(config["seed"])
    model = NETWORKS[task["network"]](images.train.shape[1], images.classes).to(device)
    decay = task["sgd_weight_decay"] if method.is_sgd else task["adamw_weight_decay"]
    optimizer = method.make(model, config["lr"], decay)
    steps = len(images.train) // task["batch_size"] * task["epochs"]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    for epoch in range(task["epochs"]):
        for inputs, labels in images.batches(task["batch_size"], epoch, config["seed"], device):
            if len(losses) == max_steps:
                break
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                return {"test_error": None, "losses": losses[:-1]}
    return {"test_error": test_error(model, images, device), "losses": losses}


@torch.no_grad()
def test_error(model: nn.Module, images: Images, device: torch.device, batch_size: int = 500) -> float:
    """Return the percentage of the test images that are classified wrongly."""
    model.eval()
    wrong = 0
    for first in range(0, len(images.test), batch_size):
        rows = slice(first, first + batch_size)
        guesses = model(images.test[rows].to(device)).argmax(1).cpu()
        wrong += int((guesses != images.test_labels[rows]).sum())
    return 100 * wrong / len(images.test)
