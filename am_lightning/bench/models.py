"""The models whose parameters are stepped: their shapes, and the network for the time of a training step."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
READ = "(first pass: reads alone)"  # name of the contender that only reads
ROW = 2048  # largest number of tokens of a row


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama that determine the shapes of its parameters, named as in its configuration."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    num_layers: int
    vocab_size: int
    tie_word_embeddings: bool

    def shapes(self) -> list[Shape]:
        """Return the shape of every parameter, in the order of the modules."""
        h, m = self.hidden_size, self.intermediate_size
        kv = h // self.num_heads * self.num_key_value_heads
        layer: list[Shape] = [(h, h), (kv, h), (kv, h), (h, h), (m, h), (m, h), (h, m), (h,), (h,)]
        head: list[Shape] = [] if self.tie_word_embeddings else [(self.vocab_size, h)]
        return [(self.vocab_size, h), *layer * self.num_layers, (h,), *head]


LLAMAS = {
    "llama60m": Llama(512, 1376, 8, 8, 8, 32000, False),  # 58 M parameters
    "llama350m": Llama(1024, 2736, 16, 16, 24, 32000, False),  # 368 M; GaLore's shape
    "llama1b": Llama(2048, 8192, 32, 8, 16, 128256, True),  # 1.24 B; Llama 3.2 1B
}


def many_tiny() -> list[Shape]:
    """Return 400 vectors, whose step time is the overhead of calls."""
    return [((64, 256, 512, 768)[i % 4],) for i in range(400)]


def ten_thousand() -> list[Shape]:
    """Return 10,000 small tensors, as of adapters or experts, whose step time grows with their number."""
    return [((64, 32), (256,))[i % 2] for i in range(10_000)]


MODELS: dict[str, Callable[[], list[Shape]]] = {
    **{name: llama.shapes for name, llama in LLAMAS.items()},
    "many-tiny": many_tiny,
    "ten-thousand": ten_thousand,
}
MOST_TENSORS = 1_000_000


def shapes_of(name: str) -> list[Shape]:
    """Return the shapes of a model, or of ``tensors:NxM``: N tensors of M elements.

    Raises:
        ValueError: if there is no such model.
    """
    if name in MODELS:
        return MODELS[name]()
    match = re.fullmatch(r"tensors:([0-9]{1,7})x([0-9]{1,12})", name)
    tensors, elements = map(int, match.groups()) if match else (0, 0)
    if not 1 <= tensors <= MOST_TENSORS or not elements:
        known = ", ".join(sorted(MODELS))
        raise ValueError(
            f"must be one of {known}, or tensors:NxM, N tensors (at most {MOST_TENSORS:,}) of M elements, not {name!r}"
        )
    return [(elements,)] * tensors


def row_of(tokens: int) -> int:
    """Return the tokens of one row, of which ``tokens`` is a multiple."""
    return min(tokens, ROW)


def make_passes(model: str, tokens: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Return a function that runs the passes of a training step, for one row of ``row_of(tokens)`` tokens.

    It discards the last gradients and runs forward and backward. On accelerators a float32 model runs under autocast
    to bfloat16.

    Raises:
        ImportError: if transformers is missing.
    """
    import torch

    from am_lightning.pretrain.model.network import build_llama, token_loss
    from am_lightning.pretrain.model.shape import LlamaShape

    llama, row = LLAMAS[model], row_of(tokens)
    with device:
        network: torch.nn.Module = build_llama(LlamaShape(seq_len=row, **vars(llama)))
        network.to(dtype)
        ids = torch.randint(0, llama.vocab_size, (1, row), device=device)
    mixed = device.type != "cpu" and dtype == torch.float32

    def passes() -> None:
        network.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            loss = token_loss(network(ids).logits, ids)
        torch.autograd.backward(loss)
        wait_for(device)

    return passes


def seconds_of(passes: Callable[[], None]) -> float:
    """Return the seconds of the passes, without the first time."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        passes()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type != "cpu":
        import torch

        torch.accelerator.synchronize()
