"""Shapes: parameters against numbers computed by hand, and against the module on the meta device."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from am_lightning.pretrain.model.network import build_llama, checkpoint_activations, token_loss
from am_lightning.pretrain.model.shape import LlamaShape, count_parameters, count_tensors, flops_per_token
from am_lightning.pretrain.runtime.errors import RecipeError

T5, LLAMA3 = 32100, 128256
FAMILY = {
    "60m": (LlamaShape(512, 1376, 8, 8, T5, 256), 58_176_000),
    "130m": (LlamaShape(768, 2048, 12, 12, T5, 256), 134_259_456),
    "350m": (LlamaShape(1024, 2736, 16, 24, T5, 256), 368_174_080),
    "1b": (LlamaShape(2048, 5461, 32, 24, T5, 256), 1_339_492_352),
    # As published: huggingface.co/meta-llama/Llama-3.2-1B (1.24 B) and Meta-Llama-3-8B (8.03 B).
    "llama-1b": (LlamaShape(2048, 8192, 32, 16, LLAMA3, 8192, 8, 500000.0, True), 1_235_814_400),
    "llama-8b": (LlamaShape(4096, 14336, 32, 32, LLAMA3, 8192, 8, 500000.0), 8_030_261_248),
}
SMALL = LlamaShape(32, 64, 4, 2, 64, 16, num_key_value_heads=2)


@pytest.mark.parametrize("name", FAMILY)
def test_parameters_are_those_worked_out_by_hand(name: str) -> None:
    shape, expected = FAMILY[name]
    with torch.device("meta"):
        parameters = list(build_llama(shape).parameters())
    assert all(param.is_meta for param in parameters)
    assert sum(param.numel() for param in parameters) == count_parameters(shape) == expected
    assert len(parameters) == count_tensors(shape)


def test_the_60m_by_the_formula_in_numbers() -> None:
    layer = 4 * 512 * 512 + 3 * 512 * 1376 + 2 * 512
    assert 2 * 32100 * 512 + 8 * layer + 512 == FAMILY["60m"][1]


def test_keys_and_values_have_fewer_heads_and_the_base_is_the_given_one() -> None:
    model = build_llama(dataclasses.replace(SMALL, rope_theta=500000.0))
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (16, 32)
    # Wavelengths of rotary embedding, dimension i of head size 8: theta^(2 i / 8).
    expected = 500000.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)


def test_a_tied_head_is_the_embedding() -> None:
    model = build_llama(dataclasses.replace(SMALL, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_flops_are_those_of_the_matrix_products() -> None:
    for shape in (SMALL, dataclasses.replace(SMALL, tie_word_embeddings=True)):
        model, tokens = build_llama(shape), torch.zeros(2, 16, dtype=torch.int64)
        attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # the counter knows no other
        with FlopCounterMode(display=False) as counter, attention:
            token_loss(model(input_ids=tokens).logits, tokens).backward()
        assert 32 * flops_per_token(shape) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    gradients, kept = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = build_llama(SMALL).train()
        if checkpointed:
            checkpoint_activations(model)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t.numel()), t)[1], lambda t: t):
            token_loss(model(input_ids=tokens).logits, tokens).backward()
        gradients.append([param.grad for param in model.parameters()])
        kept.append(sum(saved))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2


def test_attention_is_transformers_own_without_its_look_at_the_positions() -> None:
    """The result is bitwise equal, and no value is transferred to the host."""
    model, tokens = build_llama(SMALL).train(), torch.randint(64, (2, 16))
    found = []
    for name in (model.config._attn_implementation, "sdpa"):
        model.config._attn_implementation = name
        model.zero_grad()
        with Reads() as reads:
            loss = token_loss(model(input_ids=tokens).logits, tokens)
            loss.backward()
        assert name == "sdpa" or not reads.seen
        found.append([loss.detach(), *(param.grad for param in model.parameters())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    changed = tokens.clone()
    changed[:, 9:] = 0
    before, after = model(input_ids=tokens).logits, model(input_ids=changed).logits
    torch.testing.assert_close(before[:, :9], after[:, :9])  # causal


class Reads(TorchDispatchMode):
    """Record what transfers a value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal"):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_key_value_heads": 3}, "model.num_key_value_heads is 3; allowed: a divisor of num_heads = 4"),
        ({"num_key_value_heads": 0}, "model.num_key_value_heads is 0"),
        ({"rope_theta": 0.0}, "model.rope_theta is 0.0"),
        ({"hidden_size": 36}, "model.hidden_size is 36; allowed: a multiple of 2 \\* num_heads = 8"),
        ({"vocab_size": 0}, "model.vocab_size is 0"),
    ],
)
def test_a_wrong_size_is_named(change: dict[str, float], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        dataclasses.replace(SMALL, **change)
