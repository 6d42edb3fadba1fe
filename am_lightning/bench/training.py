"""The training step of a Llama: the optimizer's share of it, tokens per second, and MFU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from am_lightning.bench.contenders import Contender
from am_lightning.bench.models import wait_for
from am_lightning.optim import AMAdamW, clip_grad_norm_
from am_lightning.optim.param_groups import parameter_groups
from am_lightning.pretrain.model.network import build_llama, token_loss
from am_lightning.pretrain.model.shape import LlamaShape, flops_per_token

CLIP, WEIGHT_DECAY = 1.0, 0.1  # the values of the recipes
STEPS = 5  # consecutive steps without a wait, so that the host may run ahead, as in training
ROOM = 0.92  # share of the device's memory that the largest batch may take
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "AMAdamW default": (AMAdamW, {}),
    "AMAdamW fused": (AMAdamW, {"fused": True}),
}


@dataclass(eq=False)
class Training:
    """A Llama with float32 weights, a forward pass in bfloat16 on a GPU, and clipped gradients.

    Args:
        shape: shape of the Llama. Batches are (rows, shape.seq_len).
        device: device that trains.
        compiled: whether torch.compile compiles every layer.
    """

    shape: LlamaShape
    device: torch.device
    compiled: bool = False

    def __post_init__(self) -> None:
        with self.device:
            self.model: nn.Module = build_llama(self.shape)
        if self.compiled:
            for layer in self.model.get_submodule("model.layers").children():
                layer.compile(dynamic=False)  # the number of rows never changes
        self.contenders, self.missing = self._contenders()
        self._moments: dict[Tensor, dict[str, Tensor]] = {}

    def forward_and_backward(self, tokens: Tensor) -> None:
        """Compute the gradients of the mean loss of int64 (rows, seq_len)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu"):
            loss = token_loss(self.model(input_ids=tokens, position_ids=positions).logits, tokens)
        torch.autograd.backward(loss)

    def step(self, contender: Contender, tokens: Tensor) -> None:
        """Take a training step."""
        self.forward_and_backward(tokens)
        if isinstance(contender.optimizer, AMAdamW):
            clip_grad_norm_(contender.optimizer, CLIP)
        else:
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        contender.step()
        self.model.zero_grad(set_to_none=True)

    def tokens(self, rows: int) -> Tensor:
        """Return random tokens (rows, seq_len)."""
        generator = torch.Generator(self.device).manual_seed(0)
        size = (rows, self.shape.seq_len)
        return torch.randint(0, self.shape.vocab_size, size, generator=generator, device=self.device)

    def rows_that_fit(self, most: int, first: int = 1) -> int:
        """Return ``first``, doubled up to ``most`` while a step has enough memory. Every optimizer steps once.

        Raises:
            torch.OutOfMemoryError: if there is not enough memory for ``first``.
        """
        for contender in list(self.contenders):
            try:
                self.step(contender, self.tokens(first))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.missing[contender.name] = str(error)
                self.contenders.remove(contender)
                continue
            contender.share_moments(self._moments)  # memory for one optimizer
        rows = first
        while 2 * rows <= most and self._fits(2 * rows):
            rows *= 2
        return rows

    def measure(self, rows: int, rounds: int) -> dict[str, Any]:
        """Return medians over rounds in which all optimizers train ``STEPS`` steps in turn.

        Returns:
            ``forward and backward``: seconds without an optimizer; ``rows``: for each optimizer seconds of a step, its
            share of them (clipping included), tokens per second, TFLOP/s of the model (6 N + 12 L h s for a token), and
            peak memory in bytes.
        """
        tokens = self.tokens(rows)
        for contender in self.contenders:
            self.step(contender, tokens)
        alone: list[float] = []
        seconds: dict[str, list[float]] = {c.name: [] for c in self.contenders}
        peaks: dict[str, int | None] = {}
        for _ in range(rounds):
            alone.append(self._timed(lambda: self._without_optimizer(tokens))[0])
            for contender in self.contenders:
                spent, peaks[contender.name] = self._timed(lambda c=contender: self.step(c, tokens))  # type: ignore[misc]
                seconds[contender.name].append(spent)
        base = statistics.median(alone)
        flops = flops_per_token(self.shape) * tokens.numel()
        table = []
        for contender in self.contenders:
            spent = statistics.median(seconds[contender.name])
            table.append(
                {
                    "optimizer": contender.name,
                    "s": spent,
                    "share": max(0.0, 1 - base / spent),
                    "tokens/s": tokens.numel() / spent,
                    "TFLOP/s": flops / spent / 1e12,
                    "peak bytes": peaks[contender.name],
                    "kernels": contender.kernels(),
                }
            )
        return {"forward and backward": base, "rows": table, "left out": self.missing}

    def _contenders(self) -> tuple[list[Contender], dict[str, str]]:
        made, missing = [], {}
        for name, (kind, options) in OPTIMIZERS.items():
            groups = parameter_groups(self.model, WEIGHT_DECAY, decay_embeddings=False)
            try:
                made.append(Contender(name, "AdamW fused", kind(groups, lr=1e-6, **options), 0))
            except RuntimeError as error:
                missing[name] = str(error)
        return made, missing

    def _without_optimizer(self, tokens: Tensor) -> None:
        self.forward_and_backward(tokens)
        self.model.zero_grad(set_to_none=True)

    def _fits(self, rows: int) -> bool:
        if self.device.type != "cuda":
            return True
        try:
            torch.cuda.reset_peak_memory_stats()
            self.step(self.contenders[-1], self.tokens(rows))
            held = torch.cuda.max_memory_reserved()
        except torch.OutOfMemoryError:
            held = None
        if held is None or held > ROOM * torch.cuda.get_device_properties(self.device).total_memory:
            self.model.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
            return False
        return True

    def _timed(self, step: Callable[[], None]) -> tuple[float, int | None]:
        """Return the seconds of a step, and the peak memory."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wait_for(self.device)
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        wait_for(self.device)
        spent = (time.perf_counter() - start) / STEPS
        return spent, torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
