"""The initial matrices of a Llama: the same numbers in every program, on every device and at every number of ranks."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

SCHEME = "by seed, name and block, on the CPU"  # another one gives a seed other weights
BLOCK = 2**22  # elements with a generator of their own: a rank draws the blocks that it holds rows of


@torch.no_grad()
def draw_matrices(model: LlamaForCausalLM) -> None:
    """Give the matrices of a Llama their initial values, N(0, initializer_range).

    They depend on torch.initial_seed(), the parameter's name and the place in the matrix alone: drawn in float32 on
    the CPU, whose generator is the same everywhere (a GPU's numbers depend on its multiprocessors), and copied to
    where the parameter is. It may be whole, a DTensor, or partitioned by DeepSpeed's stage 3.
    """
    deviation = model.config.initializer_range
    for name, param in model.named_parameters():
        shape: torch.Size = getattr(param, "ds_shape", param.shape)
        if len(shape) != 2:
            continue
        if hasattr(param, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                _fill(param, name, deviation, shape, range(shape[0]), range(shape[1]))
        else:
            local = param.to_local() if isinstance(param, DTensor) else param
            _fill(local, name, deviation, shape, *_held(param))


def _fill(local: Tensor, name: str, deviation: float, shape: torch.Size, rows: range, columns: range) -> None:
    """Write these rows and columns of the parameter's whole matrix; a block is in memory at a time."""
    height = max(1, BLOCK // shape[1])
    for first in range(rows.start // height * height, rows.stop if rows else 0, height):
        block = torch.empty(min(height, shape[0] - first), shape[1], dtype=torch.float32, device="cpu")
        block.normal_(0.0, deviation, generator=_generator(name, first))
        start, stop = max(first, rows.start), min(first + height, rows.stop)
        held = block[start - first : stop - first, columns.start : columns.stop]
        local[start - rows.start : stop - rows.start].copy_(held)


def _generator(name: str, first: int) -> torch.Generator:
    digest = hashlib.sha256(f"{torch.initial_seed()} {name} {first}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:4], "big"))  # it reads 32 bits


def _held(param: Tensor) -> tuple[range, range]:
    """Rows and columns of the whole that this rank has: split by tensor parallel first, by FSDP2 after."""
    held = [range(size) for size in param.shape]
    if isinstance(param, DTensor):
        coordinate = param.device_mesh.get_coordinate()
        assert coordinate is not None
        for dimension in reversed(range(param.device_mesh.ndim)):
            split: int | None = getattr(param.placements[dimension], "dim", None)  # of Shard, and FSDP2's strided one
            if split is not None:
                size = -(-len(held[split]) // param.device_mesh.size(dimension))  # as torch.chunk divides
                held[split] = held[split][size * coordinate[dimension] :][:size]
    return held[0], held[1]
