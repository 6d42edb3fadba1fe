"""Initial weights are a function of seed, name and index, whatever a program does before and wherever it builds."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch.overrides import TorchFunctionMode

from am_lightning.pretrain.model import initial_weights
from am_lightning.pretrain.model.initial_weights import draw_matrices
from am_lightning.pretrain.model.lightning_module import LlamaPretraining
from am_lightning.pretrain.model.network import build_llama
from am_lightning.pretrain.model.shape import LlamaShape

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "num_layers": 2, "vocab_size": 64}
DRAWS = ("normal_", "uniform_", "kaiming_uniform_", "trunc_normal_")


class OtherDevice(TorchFunctionMode):
    """Pass for an accelerator: whatever is not put on the CPU by name draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(99)
        self.host: list[torch.Tensor] = []
        self.draws = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in DRAWS:
            tensor = args[0] if args else kwargs["tensor"]
            if not any(tensor is known for known in self.host):
                kwargs = kwargs | {"generator": self.generator}
                self.draws += 1
        result = func(*args, **kwargs)
        if str(kwargs.get("device")) == "cpu" and isinstance(result, torch.Tensor):
            self.host.append(result)
        return result


def shape_of(tied: bool) -> LlamaShape:
    return LlamaShape(**SIZES, seq_len=16, tie_word_embeddings=tied)


def weights(tied: bool = False, seed: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return build_llama(shape_of(tied)).state_dict()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("tied", [False, True])
def test_the_device_does_not_matter(tied: bool) -> None:
    torch.manual_seed(5)
    with OtherDevice() as device:
        found = build_llama(shape_of(tied)).state_dict()
    assert device.draws > 0  # the constructor did draw there
    assert same(found, weights(tied))


def test_lightning_builds_what_accelerate_and_the_hf_trainer_build() -> None:
    """The two other programs seed, then call build_llama. Lightning seeds early and builds in configure_model."""
    L.seed_everything(5, verbose=False)
    torch.rand(7)
    module = LlamaPretraining(**SIZES, seq_len=16)
    with OtherDevice():
        module.configure_model()
    assert same(module.network.state_dict(), weights())


def test_a_model_from_the_meta_device_gets_them_in_its_precision() -> None:
    with torch.device("meta"):
        model = build_llama(shape_of(tied=False))
    assert all(param.is_meta for param in model.parameters())
    model.to(torch.bfloat16).to_empty(device="cpu")
    torch.manual_seed(5)
    draw_matrices(model)
    expected = weights()
    matrices = {name: param for name, param in model.named_parameters() if param.ndim > 1}
    assert len(matrices) == 16
    assert all(torch.equal(param, expected[name].bfloat16()) for name, param in matrices.items())


def test_they_are_normal_and_no_two_are_alike() -> None:
    matrices = [weight for weight in weights().values() if weight.ndim > 1]
    whole = torch.cat([matrix.flatten() for matrix in matrices]) / 0.02
    count = whole.numel()
    assert abs(float(whole.mean())) < 4 / count**0.5
    assert abs(float(whole.square().mean()) - 1) < 4 * (2 / count) ** 0.5
    assert whole.unique().numel() > 0.99 * count
    assert not any(torch.equal(weight, other) for weight, other in zip(matrices, weights_of_seed(6), strict=True))


def weights_of_seed(seed: int) -> list[torch.Tensor]:
    return [weight for weight in weights(seed=seed).values() if weight.ndim > 1]


def test_a_piece_is_a_piece_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three rows: any rows and columns of a matrix, and none."""
    monkeypatch.setattr(initial_weights, "BLOCK", 15)
    shape = torch.Size([11, 5])

    def drawn(rows: range, columns: range) -> torch.Tensor:
        local = torch.full((len(rows), len(columns)), torch.nan)
        initial_weights._fill(local, "w", 1.0, shape, rows, columns)
        return local

    whole = drawn(range(11), range(5))
    assert whole.unique().numel() == whole.numel()
    for start in range(12):
        for stop in range(start, 12):
            assert torch.equal(drawn(range(start, stop), range(1, 4)), whole[start:stop, 1:4])
