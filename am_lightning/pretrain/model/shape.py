"""The shape of a Llama, its parameters and its FLOPs. It does not import torch, which takes seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from am_lightning.pretrain.runtime.errors import RecipeError, require, require_counts


@dataclasses.dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama (Touvron et al. 2023) with grouped queries (Ainslie et al. 2023).

    The fields are arguments of `LlamaPretraining`, which describes them.

    Raises:
        RecipeError: if a value is out of range.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    vocab_size: int
    seq_len: int
    num_key_value_heads: int | None = None
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        require_counts("model", intermediate_size=self.intermediate_size, num_heads=self.num_heads)
        require_counts("model", num_layers=self.num_layers, vocab_size=self.vocab_size)
        require_counts("model", 2, seq_len=self.seq_len)
        whole_heads = self.hidden_size >= 1 and self.hidden_size % (2 * self.num_heads) == 0
        allowed = f"a multiple of 2 * num_heads = {2 * self.num_heads}"
        require(whole_heads, "model.hidden_size", self.hidden_size, allowed)
        heads = self.num_key_value_heads
        fits = heads is None or (heads >= 1 and self.num_heads % heads == 0)
        require(fits, "model.num_key_value_heads", heads, f"a divisor of num_heads = {self.num_heads}, or null")
        require(self.rope_theta > 1, "model.rope_theta", self.rope_theta, "> 1")

    @classmethod
    def among(cls, values: Mapping[str, Any]) -> LlamaShape:
        """Return the shape in a section `model` or in the arguments of a model, which have other keys, too."""
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})

    def state_dict(self) -> dict[str, Any]:
        """Return the values by their names, for a checkpoint."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise a RecipeError if the model of a checkpoint has another shape."""
        for name, mine in self.state_dict().items():
            if state.get(name, mine) != mine:
                raise RecipeError(
                    f"model.{name} is {mine}, the checkpoint's model has {state[name]}. Set it back, or start a new run"
                    " in another folder."
                )

    @property
    def key_value_heads(self) -> int:
        """num_key_value_heads, or num_heads if it is None."""
        return self.num_key_value_heads or self.num_heads

    @property
    def key_value_size(self) -> int:
        """Width of the keys, and of the values."""
        return self.key_value_heads * (self.hidden_size // self.num_heads)


def count_parameters(shape: LlamaShape) -> int:
    """Return the number of parameters: V h of the embedding and of an untied head, h of the last norm, and per layer
    2 h^2 (queries, output), 2 h k (keys, values of width k), 3 h m (MLP of width m) and 2 h (norms)."""
    h = shape.hidden_size
    layer = 2 * h * h + 2 * h * shape.key_value_size + 3 * h * shape.intermediate_size + 2 * h
    vocabulary = shape.vocab_size * h * (1 if shape.tie_word_embeddings else 2)
    return vocabulary + shape.num_layers * layer + h


def count_tensors(shape: LlamaShape) -> int:
    """Return the number of parameter tensors: nine per layer, the embedding, the last norm and an untied head."""
    return 9 * shape.num_layers + (2 if shape.tie_word_embeddings else 3)


def flops_per_token(shape: LlamaShape) -> int:
    """Return the floating-point operations of the forward and backward pass per token.

    They are 6 N + 12 L h s (Chowdhery et al. 2022, PaLM, appendix B), with N parameters of matrix products (all except
    an untied embedding), L layers of width h and rows of s tokens. A third is the forward pass. The causal mask and the
    recomputation of activation checkpointing are not counted.
    """
    embedding = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    matmul_parameters = count_parameters(shape) - embedding
    return 6 * matmul_parameters + 12 * shape.num_layers * shape.hidden_size * shape.seq_len
