"""One pretraining run of a study: a recipe's model, data and schedule, with the optimizer of a Method."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Sequence

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
from recipes.studies.pretraining.noise import noisy_backward

WEIGHT_DECAY, CLIP, FINAL_LR = 0.1, 1.0, 0.1


def run_config(
    method: Method,
    lr: float,
    seed: int,
    *,
    recipe: str = "laptop",
    steps: int = 400,
    batch_size: int = 8,
    device: str = "cpu",
    micro_batch_size: int | None = None,
    traces: bool = False,
) -> Config:
    """A run as the ledger keeps it. `seed` is that of the initial weights and of the order of the data.

    `micro_batch_size`: rows that go through the device at once; None: the whole batch.
    """
    micro = {} if micro_batch_size is None else {"micro_batch_size": micro_batch_size}
    return micro | {
        "method": method.config(),
        "lr": lr,
        "seed": seed,
        "recipe": recipe,
        "steps": steps,
        "batch_size": batch_size,
        "device": device,
        "traces": traces,
    }


def setup_of(recipe: str) -> dict[str, str]:
    """What runs depend on beside their configuration: the recipe's text, how a seed becomes weights, and Python, whose
    library may be the data."""
    text = recipe_text(find_config(recipe))
    return {
        "recipe": hashlib.sha256(text.encode()).hexdigest()[:12],
        "initial weights": SCHEME,
        "Python": platform.python_version(),
    }


class Pretraining:
    """Runs the configurations of `run_config`.

    Args:
        cache_dir: folder of the tokens, shared by all runs.
    """

    def __init__(self, cache_dir: str) -> None:
        self.cache_dir = cache_dir

    def __call__(self, config: Config) -> Result:
        """Train from scratch and score.

        Returns:
            ``val_loss`` after the last step, in nats per token, None where the run diverged; ``losses`` of the training
            batches; for AM ``at_cap``, the share of (step, tensor) pairs there. With ``traces``, for AM also the
            ``names`` of the tensors and their ``betas`` (steps, tensors), and where the batch goes through the device
            in parts ``noise``: for each step the numbers that `noise_scale` takes, before clipping.
        """
        seed = str(config["seed"])
        options = {
            "config": str(find_config(config["recipe"])),
            "data.cache_dir": self.cache_dir,
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
        """``mixed``: forward in bfloat16."""
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
        """All steps, or up to the first loss that is not finite."""
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
        """Nats per token on the recipe's final validation rows."""
        self._mode("eval")
        total, rows = 0.0, 0
        for batch in data.val_loader(rows=data.final_val_rows):
            for part in torch.split(batch.to(self.device), self.micro):
                total += float(self._loss(part)) * len(part)
                rows += len(part)
        return total / rows

    def momentum(self) -> Result:
        """What AM's beta_t did; nothing for the others."""
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
        """Of the model, and of schedule-free, which evaluates at another point than it steps from."""
        getattr(self.model, name)()
        if self.method.kind == "schedulefree":
            getattr(self.optimizer, name)()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
