"""The scalars that a logger shows, computed from names and betas."""

from __future__ import annotations

import math

import pytest
import torch

from am_lightning.distributed.names import strip_wrappers
from am_lightning.loggers.metrics import MomentumStats, kind_of, layer_paths, shortened
from am_lightning.optim.intervals import Interval, nothing

KINDS = {
    "model.embed_tokens.weight": "embed",
    "model.layers.3.self_attn.q_proj.weight": "attn.qkv",
    "model.layers.3.self_attn.o_proj.weight": "attn.out",
    "model.layers.0.mlp.gate_proj.weight": "mlp",
    "model.layers.0.input_layernorm.weight": "norm",
    "lm_head.weight": "head",
    "transformer.h.1.attn.c_attn.weight": "attn.qkv",
    "transformer.h.2.mlp.c_proj.weight": "mlp",
    "transformer.wte.weight": "embed",
    "transformer.ln_f.weight": "norm",
    "encoder.layers.0.self_attn.in_proj_weight": "attn.qkv",
    "bert.encoder.layer.0.attention.output.LayerNorm.weight": "norm",
    "layers.0.feed_forward.w1.weight": "mlp",
    "conv1.weight": "other",
    # PEFT: LoRA, DoRA, an embedding's, biases, whole modules, tokens, other methods, an adapter of another name
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": "attn.qkv",
    "base_model.model.model.layers.0.self_attn.o_proj.lora_B.default.weight": "attn.out",
    "base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector.default.weight": "mlp",
    "base_model.model.transformer.wte.lora_embedding_A.default": "embed",
    "base_model.model.model.layers.0.self_attn.v_proj.base_layer.bias": "attn.qkv",
    "base_model.model.lm_head.modules_to_save.default.weight": "head",
    "base_model.model.lm_head.token_adapter.trainable_tokens_delta.default": "head",
    "base_model.model.model.layers.0.self_attn.k_proj.ia3_l.default": "attn.qkv",
    "base_model.model.model.layers.0.self_attn.o_proj.hada_w1_a.default": "attn.out",
    "base_model.model.model.layers.0.self_attn.q_proj.oft_R.default.weight": "attn.qkv",
    "model.layers.0.self_attn.q_proj.lora_A.policy.weight": "attn.qkv",
    # litgpt, torchtune, torch.nn.utils.parametrizations
    "transformer.h.0.attn.qkv.lora_A": "attn.qkv",
    "layers.0.attn.q_proj.lora_b.weight": "attn.qkv",
    "layers.0.attn.output_proj.lora_a.weight": "attn.out",
    "layers.0.attn.q_proj.parametrizations.weight.original0": "attn.qkv",
    "base_model.model.conv1.lora_A.default.weight": "other",
    "model.heads.default.weight": "other",
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_layer_groups_of_common_models(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize("wrapped", ["module._orig_mod.{}", "_orig_mod.module.{}", "_forward_module.module.{}"])
def test_an_adapters_layer_group_under_wrappers(wrapped: str) -> None:
    """DDP and torch.compile wrap a PEFT model in either order, and DeepSpeed wraps it."""
    name = "base_model.model.model.layers.0.self_attn._fsdp_wrapped_module.q_proj.lora_A.default.weight"
    assert kind_of(strip_wrappers(wrapped.format(name))) == "attn.qkv"


def layers_of(names: list[str]) -> list[str]:
    return shortened(layer_paths(names))


def test_layers_are_short_where_that_is_unambiguous() -> None:
    assert layers_of(["model.layers.3.mlp.up_proj.weight", "lm_head.weight", "0.1"]) == ["layers.3", "lm_head", "0"]
    two_stacks = ["encoder.layers.0.linear1.weight", "decoder.layers.0.linear1.weight"]
    assert layers_of(two_stacks) == ["encoder.layers.0", "decoder.layers.0"]


def test_an_adapter_is_in_the_layer_of_what_it_adapts() -> None:
    adapted = ["lm_head.modules_to_save.default", "model.layers.3.mlp.up_proj.lora_A.default", "proj.lora_A.0"]
    adapted += ["lm_head.parametrizations.weight.0", "model.heads.default"]
    names = [f"base_model.model.{name}.weight" for name in adapted]
    assert layers_of(names[:3]) == ["lm_head", "layers.3", "proj"]
    assert layers_of([names[3]]) == ["lm_head"] and layers_of([names[4]]) == ["default"]


def test_scalars_leave_out_what_has_not_stepped() -> None:
    """Two tensors have made three steps, a third one, a fourth none; their caps differ."""
    names = ["layers.0.mlp.up_proj.weight", "layers.0.norm.weight", "lm_head.weight", "layers.1.norm.weight"]
    stats = MomentumStats(names, [0.9, 0.9, 0.5, 0.9])
    rows = [[2.4, 0.6, 0.5, 0], [1, 0, 1, 0], [0, 1, 0, 0], [3, 3, 1, 0], [0.7, 0.0, 0.5, math.inf]]
    interval = Interval(*torch.tensor([*rows, [0.9, 0.4, 0.5, -math.inf]], dtype=torch.float64))
    assert stats.scalars(interval) == pytest.approx(
        {
            "am/beta/mean": 0.5,
            "am/beta/min": 0.0,
            "am/beta/max": 0.9,
            "am/beta/cap": 0.9,
            "am/beta/effective_steps": 2.0,
            "am/clamp/at_max": 2 / 7,
            "am/clamp/at_zero": 1 / 7,
            "am/beta/mlp": 0.8,
            "am/beta/mlp/min": 0.7,
            "am/beta/mlp/max": 0.9,
            "am/beta/norm": 0.2,
            "am/beta/norm/min": 0.0,
            "am/beta/norm/max": 0.4,
            "am/beta/head": 0.5,
            "am/beta/head/min": 0.5,
            "am/beta/head/max": 0.5,
        }
    )
    layers = {"layers.0": 0.5, "layers.0/min": 0.0, "lm_head": 0.5, "lm_head/min": 0.5}
    assert stats.layers(interval) == pytest.approx({f"am/beta/layer/{tag}": value for tag, value in layers.items()})
    assert stats.scalars(Interval(*nothing(interval.total, 4))) == {}


@pytest.mark.parametrize(
    "name",
    ["module.a.weight", "_orig_mod.a.weight", "a._fsdp_wrapped_module.weight", "_forward_module.module.a.weight"],
)
def test_wrappers_are_stripped(name: str) -> None:
    assert strip_wrappers(name) == "a.weight"
    assert strip_wrappers("submodule.weight") == "submodule.weight"
