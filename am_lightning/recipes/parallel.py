"""A Llama over a device mesh: tensor and sequence parallel inside a layer, FSDP2 around it, weights made in place."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
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

from am_lightning.recipes.errors import RecipeError
from am_lightning.recipes.network import LlamaShape, build_llama

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
    """split_llama, then give the model its initial weights, a tensor at a time.

    The weights are those that one process draws from the same random state of torch on the same kind of device,
    however many ranks share them: each rank draws every tensor whole and keeps its piece.
    """
    split_llama(model, shape, mesh, precision)
    device = torch.device(mesh.device_type)
    if device.type != "cpu":
        device = torch.device(device.type, torch.accelerator.current_device_index())
    model.to_empty(device=device)
    for param in model.parameters():
        if param.ndim == 1:
            nn.init.ones_(param)
    draw_matrices(model, device)
    with device:  # its buffers are functions of the configuration, which the meta device lost
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


def build_partitioned(shape: LlamaShape) -> LlamaForCausalLM:
    """build_llama where DeepSpeed's stage 3 may be partitioning what is built (deepspeed.zero.Init).

    transformers would then draw its weights into what is left of a tensor, nothing: they are drawn here.
    """
    state = torch.get_rng_state()
    on_accelerator = torch.accelerator.is_available() and torch.cuda.is_available()
    device_state = torch.cuda.get_rng_state() if on_accelerator else None
    model = build_llama(shape)
    if any(hasattr(param, "ds_id") for param in model.parameters()):
        torch.set_rng_state(state)
        if device_state is not None:
            torch.cuda.set_rng_state(device_state)
        draw_matrices(model, torch.get_default_device())
    return model


def loss_context(mesh: DeviceMesh | None) -> AbstractContextManager[None]:
    """Around the loss and its backward: logits split over the vocabulary stay split (torch's loss_parallel)."""
    context: AbstractContextManager[None] = loss_parallel() if tensor_ways(mesh) > 1 else nullcontext()
    return context


def tensor_ways(mesh: DeviceMesh | None) -> int:
    """Ranks that share a layer; 1 without a mesh."""
    return 1 if mesh is None else mesh[TENSOR].size()


@torch.no_grad()
def draw_matrices(model: LlamaForCausalLM, device: torch.device) -> None:
    """The initial matrices of transformers' Llama, N(0, initializer_range), as its constructor draws them, into a model
    that is split.

    torch's layers draw their own default first, which transformers then draws over: those numbers are drawn here, too,
    so that the random state goes the same way.
    """
    for part in (model.model, model.lm_head):
        layers = [m for m in part.modules() if isinstance(m, nn.Linear | nn.Embedding)]
        for layer in layers:
            whole = torch.empty(_shape_of(layer.weight), device=device, dtype=layer.weight.dtype)
            _ = whole.normal_() if isinstance(layer, nn.Embedding) else whole.uniform_()
        for layer in layers:
            if part is model.lm_head and layer.weight is model.model.embed_tokens.weight:
                continue
            whole = torch.empty(_shape_of(layer.weight), device=device, dtype=layer.weight.dtype)
            _write(layer.weight, whole.normal_(0.0, model.config.initializer_range))


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


def _shape_of(param: Tensor) -> torch.Size:
    shape: torch.Size = getattr(param, "ds_shape", param.shape)  # DeepSpeed's, of a partitioned one
    return shape


def _write(param: Tensor, whole: Tensor) -> None:
    """Give every rank its piece of a whole tensor."""
    if hasattr(param, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
            if param.numel():
                param.copy_(whole)
    elif isinstance(param, DTensor):
        param.to_local().copy_(_piece(whole, param))
    else:
        param.copy_(whole)


def _piece(whole: Tensor, param: DTensor) -> Tensor:
    """This rank's piece of a tensor that is split by tensor parallel first, by FSDP2 after."""
    coordinate = param.device_mesh.get_coordinate()
    assert coordinate is not None
    for dimension in reversed(range(param.device_mesh.ndim)):
        split: int | None = getattr(param.placements[dimension], "dim", None)  # of Shard, and FSDP2's strided one
        if split is not None:
            chunks = whole.chunk(param.device_mesh.size(dimension), split)
            index = coordinate[dimension]
            whole = chunks[index] if index < len(chunks) else whole.narrow(split, 0, 0)
    return whole
