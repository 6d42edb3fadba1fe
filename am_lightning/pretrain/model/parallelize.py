"""A Llama over a device mesh: tensor and sequence parallel inside a layer, FSDP2 around it, weights made in place."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from transformers import LlamaForCausalLM

from am_lightning.pretrain.model.initial_weights import draw_matrices
from am_lightning.pretrain.model.shape import LlamaShape
from am_lightning.pretrain.runtime.errors import RecipeError

DATA, TENSOR = "data_parallel", "tensor_parallel"  # dimensions of the mesh, as ModelParallelStrategy names them

_PRECISIONS = {
    "32-true": MixedPrecisionPolicy(),
    "bf16-mixed": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    "bf16-true": MixedPrecisionPolicy(reduce_dtype=torch.float32),
}


def check_tensor_parallel(shape: LlamaShape, ways: int) -> None:
    """Raise a RecipeError that names both numbers unless `ways` ranks can share every layer evenly.

    Heads, key-value heads and the MLP's width are split, and between layers the tokens of a row; the vocabulary is
    split for the embedding, the head and the loss.
    """
    sizes = {
        "model.num_heads": shape.num_heads,
        "model.num_key_value_heads": shape.key_value_heads,
        "model.intermediate_size": shape.intermediate_size,
        "model.vocab_size": shape.vocab_size,
        "model.seq_len": shape.seq_len,
    }
    for name, size in sizes.items():
        if size % ways:
            fits = [n for n in range(1, ways + 1) if all(value % n == 0 for value in sizes.values())]
            raise RecipeError(
                f"{name} is {size}, which tensor_parallel_size {ways} does not divide."
                f" Sizes up to {ways} that divide every part of this model: {', '.join(map(str, fits))}"
            )


def shard_llama(model: LlamaForCausalLM, shape: LlamaShape, mesh: DeviceMesh, precision: str) -> None:
    """split_llama, then give the model its initial weights, those of build_llama in one process; each rank holds its
    own pieces alone."""
    split_llama(model, shape, mesh, precision)
    model.to_empty(device=mesh.device_type)
    for param in model.parameters():
        if param.ndim == 1:
            nn.init.ones_(param)
    draw_matrices(model)
    with torch.device(mesh.device_type):  # its buffers are functions of the configuration, which the meta device lost
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)


def split_llama(model: LlamaForCausalLM, shape: LlamaShape, mesh: DeviceMesh, precision: str) -> None:
    """Split a Llama on the meta device over `mesh`; it stays there.

    Args:
        model: from build_llama, on the meta device.
        mesh: 2-D, dimensions "data_parallel" (FSDP2) and "tensor_parallel".
        precision: Lightning's name; with "bf16-mixed" FSDP2 gathers bfloat16 and reduces float32.

    Raises:
        RecipeError: `shape` cannot be split so, or `precision` is not one of FSDP2's.
    """
    if precision not in _PRECISIONS:
        raise RecipeError(
            f"trainer.precision is {precision!r}; allowed with ModelParallelStrategy: {' or '.join(_PRECISIONS)}"
        )
    check_tensor_parallel(shape, mesh[TENSOR].size())
    if mesh[TENSOR].size() > 1:
        _split_layers(model, mesh[TENSOR])
    if shape.tie_word_embeddings:  # splitting made two tensors of it
        model.lm_head.weight = model.model.embed_tokens.weight
    policy = _PRECISIONS[precision]
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh[DATA], mp_policy=policy)
    fully_shard(model, mesh=mesh[DATA], mp_policy=policy)


def loss_context(mesh: DeviceMesh | None) -> AbstractContextManager[None]:
    """Around the loss and its backward: logits split over the vocabulary stay split (torch's loss_parallel)."""
    split = mesh is not None and mesh[TENSOR].size() > 1
    context: AbstractContextManager[None] = loss_parallel() if split else nullcontext()
    return context


def _split_layers(model: LlamaForCausalLM, mesh: DeviceMesh) -> None:
    """Tensor parallel within attention and MLP (Shoeybi et al. 2019), sequence parallel between them (Korthikanti et
    al. 2022): an all-gather before and a reduce-scatter after each of the two, forward and backward."""
    tokens_split, whole = Shard(1), Replicate()
    layer_plan: dict[str, ParallelStyle] = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": tokens_split},
            desired_input_kwarg_layouts={"hidden_states": whole},
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=tokens_split),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=tokens_split, desired_input_layouts=whole),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=tokens_split),
    }
    plan: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=tokens_split),
        **{f"model.layers.*.{name}": style for name, style in layer_plan.items()},
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=tokens_split, output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, plan)
