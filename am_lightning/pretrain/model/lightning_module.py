"""LlamaPretraining: a LightningModule that trains a Llama on next tokens with a given optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import wrap
from torch.distributed.tensor import DTensor
from torchmetrics import MeanMetric
from transformers import LlamaForCausalLM

from am_lightning.lightning import AdaptiveMemory
from am_lightning.optim.base import AdaptiveMemoryOptimizer
from am_lightning.optim.convert import convert_adamw
from am_lightning.optim.param_groups import parameter_groups
from am_lightning.pretrain.model.network import build_llama, checkpoint_activations, token_loss
from am_lightning.pretrain.model.parallelize import loss_context, shard_llama
from am_lightning.pretrain.model.schedule import Schedule
from am_lightning.pretrain.model.shape import LlamaShape
from am_lightning.pretrain.runtime.errors import RecipeError, require

OptimizerCallable = Callable[[Iterable[Any]], torch.optim.Optimizer]


class LlamaPretraining(L.LightningModule):
    """Trains transformers' LlamaForCausalLM on rows of token ids, int64 (batch, seq_len).

    Logs `train/loss` of the micro-batch of this process, and `val/loss` and `val/perplexity` over all processes. Losses
    are means per token in nats.

    Args:
        hidden_size: width of the residual stream; a multiple of 2 * num_heads.
        intermediate_size: width of the MLP.
        num_heads: attention heads.
        num_layers: decoder layers.
        vocab_size: number of tokens in the vocabulary.
        seq_len: length of the longest row in tokens.
        optimizer: function that returns the optimizer of given parameter groups.
        weight_decay: weight decay of the matrices. Norms and the embedding have none.
        warmup_fraction: share of the steps over which the learning rate rises.
        final_lr_fraction: last learning rate as a share of the peak.
        num_key_value_heads: heads of keys and values, a divisor of num_heads; default: num_heads.
        rope_theta: base of the wavelengths of the rotary embedding. Longer rows need a larger one.
        tie_word_embeddings: use the embedding as the head.
        schedule: "cosine", "wsd" (warmup, stable, decay) or "constant".
        decay_fraction: share of the steps over which "wsd" falls at the end.
        activation_checkpointing: keep only the input of each layer, and compute the rest again in the backward pass.
        compile: apply torch.compile to each decoder layer.

    Raises:
        RecipeError: if an argument is out of range.
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
        num_key_value_heads: int | None = None,
        rope_theta: float = 10000.0,
        tie_word_embeddings: bool = False,
        schedule: Literal["cosine", "wsd", "constant"] = "cosine",
        decay_fraction: float = 0.2,
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer"])
        self.shape = LlamaShape.among(self.hparams)
        require(0 <= weight_decay < math.inf, "model.weight_decay", weight_decay, "0 <= value")
        self.schedule = Schedule(schedule, warmup_fraction, decay_fraction, final_lr_fraction)
        self.make_optimizer = optimizer
        self.weight_decay = weight_decay
        self.model: LlamaForCausalLM | None = None
        self.activation_checkpointing, self.compile_layers = activation_checkpointing, compile
        self.val_loss = MeanMetric()

    def configure_model(self) -> None:
        """Build the network, once. Strategies that shard call this hook in the context that places the weights.

        ModelParallelStrategy splits it over the mesh (parallelize.py), and FSDPStrategy wraps each layer.
        """
        if self.model is not None:
            return
        with nullcontext() if self.device_mesh is None else torch.device("meta"):
            model = build_llama(self.shape)
        if self.activation_checkpointing:
            checkpoint_activations(model)
        if self.compile_layers:
            for layer in model.model.layers:
                layer.compile()
        if self.device_mesh is not None:
            shard_llama(model, self.shape, self.device_mesh, str(self.trainer.precision))
        for index, layer in enumerate(model.model.layers):
            model.model.layers[index] = wrap(layer)  # FSDP1 wraps it, inside FSDPStrategy's context only
        self.model = cast(LlamaForCausalLM, wrap(model))

    @property
    def network(self) -> LlamaForCausalLM:
        """The model. configure_model() must have run."""
        if self.model is None:
            raise RuntimeError("configure_model() has not run")
        return self.model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, (batch, seq_len, vocab_size), of token ids, (batch, seq_len)."""
        # With sequence parallelism a layer sees a part of the row, and cannot know its positions.
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        logits: Tensor = self.network(input_ids=tokens, position_ids=positions).logits
        return logits

    def on_train_start(self) -> None:
        """Keep DeepSpeed (0.19) from dividing the loss by the number of micro-batches, as Lightning (2.6) already does.

        Gradients that are divided twice change clipping and beta_t.
        """
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            engine = self.trainer.strategy.deepspeed_engine
            engine.backward = partial(engine.backward, scale_wrt_gas=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/loss", loss)  # prog_bar=True would copy it to the host after every batch
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with loss_context(self.device_mesh):
            super().backward(loss, *args, **kwargs)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.val_loss.update(self._loss(batch), len(batch))

    def on_validation_epoch_end(self) -> None:
        loss = self.val_loss.compute()  # over all processes
        # The validation after the training scores other rows, for the summary.
        in_curves = self.trainer.state.fn == "fit"
        self.log("val/loss", loss, prog_bar=True, logger=in_curves, sync_dist=True)
        self.log("val/perplexity", loss.exp(), logger=in_curves, sync_dist=True)
        self.val_loss.reset()

    def optimizer_for(self, network: nn.Module, memory: AdaptiveMemory | None = None) -> torch.optim.Optimizer:
        """Return the optimizer of `network`, converted as the callback `memory` would convert it.

        Raises:
            ValueError, TypeError: if an option is out of range, or the optimizer cannot be converted.
        """
        groups = parameter_groups(network, self.weight_decay, decay_embeddings=False)
        optimizer: Any = self.make_optimizer(groups)
        if memory is not None and not isinstance(optimizer, AdaptiveMemoryOptimizer):
            optimizer = convert_adamw(optimizer, lambd=memory.lambd, beta1_max=memory.beta1_max, scope=memory.scope)
        optimizer.register_load_state_dict_pre_hook(_refuse_another_kind)
        _keep_options(optimizer)
        return cast(torch.optim.Optimizer, optimizer)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer_for(self.network)
        scheduler = self.schedule.scheduler(optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _loss(self, batch: Tensor) -> Tensor:
        with loss_context(self.device_mesh):
            loss = token_loss(self(batch), batch)
        return loss.to_local() if isinstance(loss, DTensor) else loss


def _refuse_another_kind(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Refuse the state of an Adam for an SGD and the reverse, whose step would end with a KeyError."""
    for group in state_dict.get("param_groups", ())[:1]:
        if ("betas" in group) != ("betas" in optimizer.defaults):
            kind = "an Adam" if "betas" in group else "an SGD"
            raise RecipeError(f"model.optimizer is {type(optimizer).__name__}, the checkpoint's is {kind}")


def _keep_options(optimizer: torch.optim.Optimizer) -> None:
    """Let the numbers among the options (weight decay, betas, ...) stay when a state is loaded, which has those of its
    run. The learning rate is the schedule's."""
    live: list[dict[str, Any]] = []

    def before(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        names = {"lr", "initial_lr", "params", "param_names"}
        numbers = (float, list, tuple)
        live[:] = [
            {key: value for key, value in group.items() if key not in names and isinstance(value, numbers)}
            for group in optimizer.param_groups
        ]

    def after(_: torch.optim.Optimizer) -> None:
        for group, options in zip(optimizer.param_groups, live, strict=True):
            group.update(options)

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)


def check_optimizer(module: LlamaPretraining, memory: AdaptiveMemory | None) -> torch.optim.Optimizer:
    """Return an optimizer of weights on the meta device, which take no memory.

    Raises:
        RecipeError: if an option is out of range, or the optimizer cannot be converted.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build_llama(module.shape)
    try:
        return module.optimizer_for(model, memory)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"model.optimizer: {error}") from error
