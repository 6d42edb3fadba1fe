"""The module: shapes, loss, parameter groups, schedule, FLOPs."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from am_lightning import AMAdamW
from am_lightning.pretrain.model.lightning_module import LlamaPretraining
from am_lightning.pretrain.model.network import token_loss
from am_lightning.pretrain.model.shape import flops_per_token
from am_lightning.pretrain.runtime.errors import RecipeError

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "num_layers": 2,
    "seq_len": 16,
    "optimizer": partial(AMAdamW, lr=1e-3, betas=(0.8, 0.95)),
}


def build(**options: Any) -> LlamaPretraining:
    torch.manual_seed(0)
    module = LlamaPretraining(**{**TINY, **options})
    module.configure_model()
    module._trainer = SimpleNamespace(max_steps=10)  # all that configure_optimizers reads of it
    return module


def test_building_twice_keeps_the_weights() -> None:
    module = build()
    before = module.model
    module.configure_model()
    assert module.model is before


def test_the_loss_is_transformers_own() -> None:
    module = build()
    tokens = torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(0))
    logits = module(tokens)
    assert logits.shape == (3, 16, 256)
    loss = token_loss(logits, tokens)
    torch.testing.assert_close(loss, module.model(input_ids=tokens, labels=tokens).loss)
    assert abs(loss.item() - math.log(256)) < 0.3


def test_the_head_is_not_tied_and_attention_is_sdpa() -> None:
    config = build().model.config
    assert (config.tie_word_embeddings, config.use_cache) == (False, False)
    assert config._attn_implementation.startswith("sdpa")


def test_norms_and_the_embedding_do_not_decay() -> None:
    groups = build(weight_decay=0.3).configure_optimizers()["optimizer"].param_groups
    decay = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert set(decay.values()) == {0.0, 0.3}
    for name, value in decay.items():
        assert value == (0.0 if "norm" in name or "embed" in name else 0.3), name
    assert decay["lm_head.weight"] == 0.3
    assert len(decay) == len(list(build().model.parameters()))


def test_flops_are_those_of_the_matrix_products() -> None:
    module = build()
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    expected = tokens.numel() * flops_per_token(module.shape)
    # The counter does not know the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        token_loss(module(tokens), tokens).backward()
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.02)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        token_loss(module(tokens), tokens)
    assert expected / 3 == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", 30),
        ("intermediate_size", 0),
        ("num_heads", 0),
        ("num_layers", -1),
        ("seq_len", 1),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("weight_decay", math.inf),
        ("warmup_fraction", 1.5),
        ("warmup_fraction", math.nan),
        ("final_lr_fraction", -0.1),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: float) -> None:
    with pytest.raises(RecipeError, match=rf"model.{name} is {value}; allowed: "):
        LlamaPretraining(**{**TINY, name: value})
