"""LlamaPretraining: next-token training of a Llama as a LightningModule; the optimizer is injected."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.text import Perplexity
from transformers import LlamaConfig, LlamaForCausalLM

from am_lightning.factory import parameter_groups
from am_lightning.recipes.errors import require

OptimizerCallable = Callable[[Iterable[Any]], torch.optim.Optimizer]


def learning_rate_factor(step: int, *, total: int, warmup_fraction: float, final_fraction: float) -> float:
    """The learning rate of optimizer step `step` (from 0) as a share of the peak.

    Linear over the first `warmup_fraction` of `total` steps, then half a cosine down to `final_fraction`.
    """
    warmup = round(total * warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


class LlamaPretraining(L.LightningModule):
    """A Llama (transformers' LlamaForCausalLM, untied head) trained on rows of token ids, int64 (batch, seq_len).

    Logs `train/loss` (of this process's micro-batch), `val/loss` and `val/perplexity` (over all processes); losses are
    means per token in nats.

    Args:
        hidden_size: width of the residual stream; a multiple of 2 * num_heads.
        intermediate_size: width of the MLP.
        num_heads: attention heads.
        num_layers: decoder layers.
        vocab_size: tokens.
        seq_len: longest row, in tokens.
        optimizer: makes the optimizer from parameter groups.
        weight_decay: of the matrices; norms and the embedding get none.
        warmup_fraction: share of the steps over which the learning rate rises; 0 for none.
        final_lr_fraction: where the cosine ends, as a share of the peak.

    Raises:
        RecipeError: an argument is out of range.
    """

    def __init__(
        self,
        hidden_size: int = 128,
        intermediate_size: int = 344,
        num_heads: int = 4,
        num_layers: int = 4,
        vocab_size: int = 256,
        seq_len: int = 128,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        weight_decay: float = 0.1,
        warmup_fraction: float = 0.0,
        final_lr_fraction: float = 0.1,
    ) -> None:
        super().__init__()
        sizes = {"intermediate_size": intermediate_size, "num_heads": num_heads, "num_layers": num_layers}
        for name, value in sizes.items():
            require(value >= 1, f"model.{name}", value, "a whole number >= 1")
        require(seq_len >= 2, "model.seq_len", seq_len, "a whole number >= 2")
        whole_heads = hidden_size >= 1 and hidden_size % (2 * num_heads) == 0
        require(whole_heads, "model.hidden_size", hidden_size, f"a multiple of 2 * num_heads = {2 * num_heads}")
        require(0 <= weight_decay < math.inf, "model.weight_decay", weight_decay, "0 <= value")
        require(0 <= warmup_fraction <= 1, "model.warmup_fraction", warmup_fraction, "0 <= value <= 1")
        require(0 <= final_lr_fraction <= 1, "model.final_lr_fraction", final_lr_fraction, "0 <= value <= 1")
        self.save_hyperparameters(ignore=["optimizer"])
        self.make_optimizer = optimizer
        self.model: LlamaForCausalLM | None = None
        self.val_perplexity = Perplexity()
        self._batch_tokens = 0
        self._matmul_parameters = 0

    def configure_model(self) -> None:
        """Build the network. Strategies that shard call this hook where the weights are to live; it may come again."""
        if self.model is not None:
            return
        sizes = self.hparams
        config = LlamaConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.intermediate_size,
            num_attention_heads=sizes.num_heads,
            num_key_value_heads=sizes.num_heads,
            num_hidden_layers=sizes.num_layers,
            max_position_embeddings=sizes.seq_len,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self.model = LlamaForCausalLM(config)
        # Counted here, while every parameter is whole.
        self._matmul_parameters = sum(p.numel() for n, p in self.model.named_parameters() if "embed_tokens" not in n)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, seq_len, vocab_size) for token ids (batch, seq_len)."""
        return self.model(input_ids=tokens).logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self._batch_tokens = batch.numel()
        loss, _, _ = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._batch_tokens = batch.numel()
        loss, logits, targets = self._loss(batch)
        self.val_perplexity(logits, targets)
        # The curve holds the validations during training; the one after it scores other rows and goes to the summary.
        options = {"logger": self.trainer.state.fn == "fit", "on_step": False, "on_epoch": True}
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch), **options)
        self.log("val/perplexity", self.val_perplexity, **options)

    def configure_optimizers(self) -> dict[str, Any]:
        groups = parameter_groups(self.model, self.hparams.weight_decay, decay_embeddings=False)
        optimizer = self.make_optimizer(groups)
        factor = partial(
            learning_rate_factor,
            total=self.trainer.max_steps,
            warmup_fraction=self.hparams.warmup_fraction,
            final_fraction=self.hparams.final_lr_fraction,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def flops_per_batch(self) -> int:
        """Floating-point operations of the last batch on this process, for ThroughputMonitor.

        6 N + 12 L h s for a token of training (Chowdhery et al. 2022, PaLM, appendix B): N parameters without the input
        embedding, L layers of width h, rows of s tokens, attention counted without its causal mask. A third of it,
        the forward pass, in validation.
        """
        sizes = self.hparams
        forward = 2 * self._matmul_parameters + 4 * sizes.num_layers * sizes.hidden_size * sizes.seq_len
        return self._batch_tokens * forward * (3 if self.training else 1)

    def _loss(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss, logits (batch, seq_len - 1, vocab_size) in float32 and targets (batch, seq_len - 1)."""
        logits, targets = self(tokens)[:, :-1].float(), tokens[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits, targets
