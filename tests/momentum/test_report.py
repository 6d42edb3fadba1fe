"""From names and betas to what a logger shows."""

from __future__ import annotations

import pytest
import torch

from am_lightning.momentum import MomentumReport, kind_of, layers_of
from am_lightning.names import strip_wrappers

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
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_layer_groups_of_common_models(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_layers_are_short_where_that_is_unambiguous() -> None:
    assert layers_of(["model.layers.3.mlp.up_proj.weight", "lm_head.weight", "0.1"]) == ["layers.3", "lm_head", "0"]
    two_stacks = ["encoder.layers.0.linear1.weight", "decoder.layers.0.linear1.weight"]
    assert layers_of(two_stacks) == ["encoder.layers.0", "decoder.layers.0"]


def test_scalars_leave_out_what_has_never_stepped() -> None:
    names = ["layers.0.mlp.up_proj.weight", "layers.0.norm.weight", "lm_head.weight", "layers.1.norm.weight"]
    report = MomentumReport(names, [0.9, 0.9, 0.5, 0.9])
    scalars = report.scalars(torch.tensor([0.9, 0.0, 0.5, float("nan")]))
    assert scalars == pytest.approx(
        {
            "am/beta/mean": 1.4 / 3,
            "am/beta/min": 0.0,
            "am/beta/max": 0.9,
            "am/clamp/at_max": 2 / 3,
            "am/clamp/at_zero": 1 / 3,
            "am/beta/mlp": 0.9,
            "am/beta/norm": 0.0,
            "am/beta/head": 0.5,
        }
    )
    layers = report.layers(torch.tensor([0.9, 0.0, 0.5, float("nan")]))
    assert layers == pytest.approx({"am/beta/layer/layers.0": 0.45, "am/beta/layer/lm_head": 0.5})
    assert report.scalars(torch.full((4,), float("nan"))) == {}


@pytest.mark.parametrize(
    "name",
    ["module.a.weight", "_orig_mod.a.weight", "a._fsdp_wrapped_module.weight", "_forward_module.module.a.weight"],
)
def test_wrappers_are_stripped(name: str) -> None:
    assert strip_wrappers(name) == "a.weight"
    assert strip_wrappers("submodule.weight") == "submodule.weight"
