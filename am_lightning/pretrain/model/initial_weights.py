"""Initialize a Llama with the same numbers in each program, on any device and with any number of ranks."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

SCHEME = "by seed, name and block, on the CPU"  # another scheme gives other weights to the same seed
BLOCK = 2**22  # elements of one generator; a rank draws the blocks that contain its rows


@torch.no_grad()
def draw_matrices(model: LlamaForCausalLM) -> None:
    """Draw the matrices of a Llama from N(0, initializer_range).

    The values depend only on torch.initial_seed(), the name of the parameter and the position in the matrix. They are
    drawn in float32 on the CPU, because the numbers of a GPU depend on its multiprocessors. A parameter may be whole, a
    DTensor, or partitioned by DeepSpeed's stage 3.
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
    """Write the given rows and columns of the whole matrix, with one block in memory at a time."""
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


def _held(param: Tensor) -> list[range]:
    """Return the rows and columns of this rank."""
    if not isinstance(param, DTensor):
        return [range(size) for size in param.shape]
    [chunk] = param.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return [range(first, first + size) for first, size in zip(chunk.offsets, chunk.sizes, strict=True)]
