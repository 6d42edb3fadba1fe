"""Split a Llama over a device mesh: tensor and sequence parallelism inside a layer, FSDP2 around it."""

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
from am_lightning.pretrain.runtime.errors import RecipeError, require

DATA, TENSOR = "data_parallel", "tensor_parallel"  # ModelParallelStrategy's names of the dimensions of the mesh

_PRECISIONS = {
    "32-true": MixedPrecisionPolicy(),
    "bf16-mixed": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    "bf16-true": MixedPrecisionPolicy(reduce_dtype=torch.float32),
}


def check_tensor_parallel(shape: LlamaShape, ways: int) -> None:
    """Raise a RecipeError unless `ways` ranks can share each layer evenly.

    Attention is split by heads and key-value heads, the MLP by its width, activations between them by the tokens of a
    row, and the embedding, the head and the loss by the vocabulary.
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
    """Split a Llama, and initialize the shards of this rank with the weights that build_llama gives in one process."""
    split_llama(model, shape, mesh, precision)
    model.to_empty(device=mesh.device_type)
    for param in model.parameters():
        if param.ndim == 1:
            nn.init.ones_(param)
    draw_matrices(model)
    with torch.device(mesh.device_type):  # the buffers have no values on the meta device
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)


def split_llama(model: LlamaForCausalLM, shape: LlamaShape, mesh: DeviceMesh, precision: str) -> None:
    """Split a Llama over `mesh`, and leave it on the meta device.

    Args:
        model: model from build_llama on the meta device.
        shape: its shape.
        mesh: mesh with the dimensions "data_parallel" (FSDP2) and "tensor_parallel".
        precision: Lightning's name of the precision. With "bf16-mixed" FSDP2 gathers bfloat16 and reduces float32.

    Raises:
        RecipeError: if `shape` cannot be split, or `precision` is not supported.
    """
    allowed = f"{' or '.join(_PRECISIONS)}, with ModelParallelStrategy"
    require(precision in _PRECISIONS, "trainer.precision", precision, allowed)
    check_tensor_parallel(shape, mesh[TENSOR].size())
    if mesh[TENSOR].size() > 1:
        _split_layers(model, mesh[TENSOR])
    if shape.tie_word_embeddings:  # the split has made two tensors of one
        model.lm_head.weight = model.model.embed_tokens.weight
    policy = _PRECISIONS[precision]
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh[DATA], mp_policy=policy)
    fully_shard(model, mesh=mesh[DATA], mp_policy=policy)


def loss_context(mesh: DeviceMesh | None) -> AbstractContextManager[None]:
    """Return a context for the loss and its backward, in which logits stay split over the vocabulary."""
    split = mesh is not None and mesh[TENSOR].size() > 1
    context: AbstractContextManager[None] = loss_parallel() if split else nullcontext()
    return context


def _split_layers(model: LlamaForCausalLM, mesh: DeviceMesh) -> None:
    """Apply tensor parallelism to attention and MLP (Shoeybi et al. 2019), and sequence parallelism between them
    (Korthikanti et al. 2022), with an all-gather before and a reduce-scatter after each of the two."""
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
