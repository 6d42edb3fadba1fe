"""The Llama itself: the module and its loss."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from am_lightning.pretrain.model.initial_weights import draw_matrices
from am_lightning.pretrain.model.shape import LlamaShape
from am_lightning.pretrain.runtime.errors import RecipeError

_UNMASKED = "sdpa_unmasked"


def build_llama(shape: LlamaShape) -> LlamaForCausalLM:
    """transformers' Llama of this shape, on the current default device; its weights are draw_matrices', unless on meta.

    Attention is torch's scaled_dot_product_attention, causal; there is no key-value cache.
    """
    model = LlamaForCausalLM(llama_config(shape, use_cache=False, attn_implementation=_attention()))
    if not model.lm_head.weight.is_meta:
        draw_matrices(model)
    return model


def trained_llama(config: LlamaConfig, weights: Mapping[str, Tensor]) -> LlamaForCausalLM:
    """transformers' Llama with these weights, which it shares, on the CPU and in eval mode.

    Args:
        config: from llama_config.
        weights: by their names in LlamaForCausalLM; a tied head may be left out.

    Raises:
        RecipeError: they are those of another shape.
    """
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    tied = {"lm_head.weight": weights["model.embed_tokens.weight"]} if config.tie_word_embeddings else {}
    try:
        model.load_state_dict({**weights, **tied}, assign=True)
    except RuntimeError as error:
        words = " ".join(str(error).split())
        raise RecipeError(f"the weights do not fit the model that was saved with them: {words}") from error
    model.tie_weights()
    # Its buffers are functions of the configuration, which the meta device lost.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    trained: LlamaForCausalLM = model.eval()
    return trained


def llama_config(shape: LlamaShape, **options: Any) -> LlamaConfig:
    """transformers' configuration of a Llama of this shape.

    Args:
        shape: of the Llama.
        options: more of LlamaConfig's arguments.
    """
    theirs = {
        "num_heads": "num_attention_heads",
        "num_layers": "num_hidden_layers",
        "seq_len": "max_position_embeddings",
    }
    sizes = {theirs.get(name, name): value for name, value in shape.state_dict().items()}
    return LlamaConfig(**sizes, **options)


def _attention() -> str:
    """transformers' sdpa under a name of its own: for a name that has no masks, transformers (from 4.53 on) makes none.

    Under "sdpa" every forward pass looks whether positions start anew within a row, and waits for the device to know.
    """
    if importlib.util.find_spec("transformers.masking_utils") is None:
        return "sdpa"
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
    return _UNMASKED


def checkpoint_activations(model: LlamaForCausalLM) -> None:
    """Keep only each layer's input for the backward pass, which computes the rest again (Chen et al. 2016)."""
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5 on
        model.activation_checkpointing_enable()
    else:
        old: Any = model
        old.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of every token but the first, in nats per token, in float32.

    Args:
        logits: (rows, seq_len, vocab_size); those at the last position are not used.
        tokens: int64 (rows, seq_len).
    """
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())
