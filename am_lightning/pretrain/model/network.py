"""Build transformers' Llama, and compute its loss."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from am_lightning.pretrain.model.initial_weights import draw_matrices
from am_lightning.pretrain.model.shape import LlamaShape

_UNMASKED = "sdpa_unmasked"


def build_llama(shape: LlamaShape) -> LlamaForCausalLM:
    """Return a Llama on the default device, without a key-value cache, with causal scaled_dot_product_attention.

    draw_matrices initializes its weights, except on the meta device.
    """
    model = LlamaForCausalLM(llama_config(shape, use_cache=False, attn_implementation=_attention()))
    if not model.lm_head.weight.is_meta:
        draw_matrices(model)
    return model


def llama_config(shape: LlamaShape, **options: Any) -> LlamaConfig:
    """Return transformers' configuration of a Llama. `options` are further arguments of LlamaConfig."""
    theirs = {
        "num_heads": "num_attention_heads",
        "num_layers": "num_hidden_layers",
        "seq_len": "max_position_embeddings",
    }
    sizes = {theirs.get(name, name): value for name, value in shape.state_dict().items()}
    return LlamaConfig(**sizes, **options)


def _attention() -> str:
    """Register transformers' sdpa under another name, for which transformers (from 4.53) creates no masks.

    Under "sdpa" each forward pass checks whether positions restart within a row, and waits for the device.
    """
    if importlib.util.find_spec("transformers.masking_utils") is None:
        return "sdpa"
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
    return _UNMASKED


def checkpoint_activations(model: LlamaForCausalLM) -> None:
    """Keep only the input of each layer, and compute the rest again in the backward pass (Chen et al. 2016)."""
    if hasattr(model, "activation_checkpointing_enable"):  # the name in transformers 5
        model.activation_checkpointing_enable()
    else:
        old: Any = model
        old.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean negative log-likelihood in nats of all tokens except the first, computed in float32.

    Args:
        logits: (rows, seq_len, vocab_size). Those at the last position are not used.
        tokens: int64, (rows, seq_len).
    """
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())
