"""A pretraining run of a study: a recipe's model, data and schedule, with the optimizer of a Method."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from am_lightning import AMAdamW, clip_grad_norm_
from am_lightning.optim.param_groups import parameter_groups
from am_lightning.pretrain.data.text_data import TextData
from am_lightning.pretrain.model.initial_weights import SCHEME
from am_lightning.pretrain.model.network import build_llama, token_loss
from am_lightning.pretrain.model.schedule import Schedule
from am_lightning.pretrain.runtime.paths import find_config
from am_lightning.pretrain.runtime.recipe_text import recipe_text
from am_lightning.pretrain.runtime.run_config import read_run_config
from recipes.studies.ledger import Config, Result
from recipes.studies.pretraining.methods import Method, fix_momentum, make_optimizer

WEIGHT_DECAY, CLIP, FINAL_LR = 0.1, 1.0, 0.1


@dataclass(frozen=True)
class Scale:
    """The scale of a run.

    Attributes:
        recipe: name of a recipe, or its YAML.
        steps: optimizer steps.
        batch_size: rows of a step.
        device: device that trains.
        micro_batch_size: rows that go through the device at once. None: the whole batch.
    """

    recipe: str = "laptop"
    steps: int = 400
    batch_size: int = 8
    device: str = "cpu"
    micro_batch_size: int | None = None

    def __str__(self) -> str:
        return f"{self.batch_size} rows x {self.steps} steps"

    def config(
        self, method: Method, lr: float, seed: int, *, batch: int = 1, long: int = 1, traces: bool = False
    ) -> Config:
        """Return the configuration of a run, as the ledger keeps it.

        Args:
            method: optimizer of the run.
            lr: peak learning rate.
            seed: seed of the initial weights and of the order of the data.
            batch: factor of the batch.
            long: factor of the steps.
            traces: whether beta_t of every step and tensor is recorded, and the noise of the gradient if the batch is
                split into micro-batches.
        """
        micro = {} if self.micro_batch_size is None else {"micro_batch_size": self.micro_batch_size}
        return micro | {
            "method": asdict(method),
            "lr": lr,
            "seed": seed,
            "recipe": self.recipe,
            "steps": self.steps * long,
            "batch_size": self.batch_size * batch,
            "device": self.device,
            "traces": traces,
        }


def setup_of(recipe: str) -> dict[str, str]:
    """Return what runs depend on beside their configuration.

    These are the recipe's text, the scheme of the initial weights, and Python, whose library may be the data.
    """
    text = recipe_text(find_config(recipe))
    return {
        "recipe": hashlib.sha256(text.encode()).hexdigest()[:12],
        "initial weights": SCHEME,
        "Python": platform.python_version(),
    }


def pretrain(cache_dir: str, config: Config) -> Result:
    """Train from scratch and score.

    Args:
        cache_dir: folder of the tokens. All runs share it.
        config: configuration of a `Scale`.

    Returns:
        ``val_loss`` after the last step, in nats per token, or None if the run diverged; ``losses`` of the training
        batches; for AM ``at_cap``, the share of (step, tensor) pairs at the cap. With ``traces``, for AM also the
        ``names`` of the tensors and their ``betas`` (steps, tensors), and with micro-batches ``noise``: for each step
        the numbers that `noise_scale` takes, before clipping.
    """
    seed = str(config["seed"])
    options = {
        "config": str(find_config(config["recipe"])),
        "data.cache_dir": cache_dir,
        "data.batch_size": str(config["batch_size"]),
        "data.seed": seed,
        "seed_everything": seed,
        "trainer.max_steps": str(config["steps"]),
    }
    settings = read_run_config([part for key, value in options.items() for part in (f"--{key}", value)])
    settings.data.prepare()
    settings.data.open()
    torch.manual_seed(config["seed"])
    mixed = config["device"] != "cpu" and settings.precision == "bf16-mixed"
    run = _Run(Method(**config["method"]), config, build_llama(settings.shape).to(config["device"]), mixed)
    run.train(settings.data)
    loss = run.validate(settings.data) if len(run.losses) == config["steps"] else math.inf
    result: Result = {"val_loss": _finite(loss), "losses": [_finite(round(value, 4)) for value in run.losses]}
    return result | run.momentum() | ({"noise": run.noise} if run.noise else {})


class _Run:
    def __init__(self, method: Method, config: Config, model: nn.Module, mixed: bool) -> None:
        self.method, self.model, self.mixed = method, model, mixed
        self.lr, self.steps, self.traces = config["lr"], config["steps"], config["traces"]
        self.device = torch.device(config["device"])
        self.micro = config.get("micro_batch_size") or config["batch_size"]
        groups = parameter_groups(model, WEIGHT_DECAY, decay_embeddings=False)
        self.optimizer = make_optimizer(method, groups, self.lr, self.steps)
        self.losses: list[float] = []
        self.betas: list[Tensor] = []
        self.names: list[str] = []
        self.noise: list[tuple[float, float]] = []

    def train(self, data: TextData) -> None:
        """Take all steps, or stop at the first loss that is not finite."""
        self._mode("train")
        for step, batch in enumerate(data.train_loader(steps=self.steps)):
            if self.method.am_until < 1 and step == round(self.steps * self.method.am_until):
                assert isinstance(self.optimizer, AMAdamW)
                self.optimizer = fix_momentum(self.optimizer)
            loss = self._step(step, batch.to(self.device))
            self.losses.append(loss)
            if not math.isfinite(loss):
                return

    @torch.no_grad()
    def validate(self, data: TextData) -> float:
        """Return the loss in nats per token on the recipe's final validation rows."""
        self._mode("eval")
        total, rows = 0.0, 0
        for batch in data.val_loader(rows=data.final_val_rows):
            for part in torch.split(batch.to(self.device), self.micro):
                total += float(self._loss(part)) * len(part)
                rows += len(part)
        return total / rows

    def momentum(self) -> Result:
        """Return the results about AM's beta_t, or nothing for other methods."""
        if not self.betas:
            return {}
        history = torch.stack(self.betas)
        result: Result = {"at_cap": float((history[1:] >= self.method.beta1 - 1e-6).double().mean())}
        if self.traces:
            result |= {"names": self.names, "betas": [[round(b, 4) for b in row] for row in history.tolist()]}
        return result

    def _step(self, step: int, batch: Tensor) -> float:
        if self.method.kind != "schedulefree":
            factor = Schedule("cosine", self.method.warmup, 0.0, FINAL_LR).factor(step, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * factor
        loss = self._backward(torch.split(batch, self.micro))
        if isinstance(self.optimizer, AMAdamW):
            clip_grad_norm_(self.optimizer, CLIP)
        else:
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if isinstance(self.optimizer, AMAdamW):
            momentum = self.optimizer.momentum()
            self.names = list(momentum)
            self.betas.append(torch.stack(list(momentum.values())).cpu())
        return loss

    def _backward(self, parts: Sequence[Tensor]) -> float:
        if self.traces and len(parts) > 1:
            loss, *norms = noisy_backward(list(self.model.parameters()), parts, self._loss)
            self.noise.append((norms[0], norms[1]))
            return loss
        loss, rows = 0.0, sum(map(len, parts))
        for part in parts:
            share = self._loss(part) * (len(part) / rows)
            torch.autograd.backward(share)
            loss += float(share.detach())
        return loss

    def _loss(self, rows: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            return token_loss(self.model(input_ids=rows).logits, rows)

    def _mode(self, name: str) -> None:
        """Set the mode of the model, and of schedule-free, which evaluates at another point than it steps from."""
        getattr(self.model, name)()
        if self.method.kind == "schedulefree":
            getattr(self.optimizer, name)()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def noisy_backward(
    parameters: Sequence[Tensor], parts: Sequence[Tensor], loss_of: Callable[[Tensor], Tensor]
) -> tuple[float, float, float]:
    """Compute the gradient of a batch from its micro-batches, and the norms of their gradients.

    Args:
        parameters: parameters whose ``.grad`` becomes the mean gradient of the batch.
        parts: micro-batches of equal size.
        loss_of: function that returns the mean loss of a micro-batch.

    Returns:
        The batch's loss, the mean over parts of |gradient|^2, and |mean gradient|^2.
    """
    total = [torch.zeros_like(parameter) for parameter in parameters]
    loss = norms = 0.0
    for part in parts:
        value = loss_of(part)
        gradients = torch.autograd.grad(value, parameters)
        for mean, gradient in zip(total, gradients, strict=True):
            mean.add_(gradient, alpha=1 / len(parts))
        norms += _squared_norm(gradients) / len(parts)
        loss += float(value.detach()) / len(parts)
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient
    return loss, norms, _squared_norm(total)


def noise_scale(part_norms: np.ndarray, batch_norms: np.ndarray, part_rows: int, batch_rows: int) -> float:
    """Return the rows at which a gradient's noise equals the gradient: tr(covariance of a row) / |true gradient|^2.

    This is B_simple of McCandlish et al. 2018 (An empirical model of large-batch training, appendix A.1). Both of its
    unbiased estimators are averaged over steps before they are divided.

    Args:
        part_norms, batch_norms: (steps,) results of `noisy_backward` in each step.
        part_rows, batch_rows: rows of a micro-batch and of the batch.

    Returns:
        The scale in rows, infinite if no gradient is seen above the noise.
    """
    small, large = float(np.mean(part_norms)), float(np.mean(batch_norms))
    true = (batch_rows * large - part_rows * small) / (batch_rows - part_rows)
    noise = (small - large) / (1 / part_rows - 1 / batch_rows)
    return noise / true if true > 0 else float("inf")


def _squared_norm(tensors: Sequence[Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors))
