"""``fused=True`` on a GPU where Triton cannot build or launch: said when the optimizer is made, and on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from am_lightning import AMAdamW
from am_lightning.optim import base
from am_lightning.optim.convert import convert_adamw
from am_lightning.optim.kernels import fused, triton_pair

CPU = torch.device("cpu")
TEXT = r"builds Triton kernels, which failed .* on cpu \(.*no C compiler\).*gcc.*Python\.h.*libcuda.*fused=None"


class Kernel:
    """Stands in for a Triton kernel that has no compiler, or for one that does nothing."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.launches = error, 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches += 1
            if self.error is not None:
                raise self.error

        return launch


def stand_in(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> Kernel:
    kernel = Kernel(error)
    module = SimpleNamespace(
        tl=SimpleNamespace(float32=0, float64=0), sums_kernel=kernel, reduce_kernel=kernel, update_kernel=kernel
    )
    monkeypatch.setattr(triton_pair, "require_triton", lambda: module)
    monkeypatch.setattr(fused, "TRITON_DEVICES", {"cpu"})
    return kernel


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """The CPU passes for a GPU whose kernels cannot be built."""
    monkeypatch.setenv("PATH", "")
    triton_pair.require_launch.cache_clear()
    yield stand_in(monkeypatch, RuntimeError("Failed to find\nno C compiler"))
    triton_pair.require_launch.cache_clear()


@pytest.fixture
def working(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    triton_pair.require_launch.cache_clear()
    yield stand_in(monkeypatch, None)
    triton_pair.require_launch.cache_clear()


def params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3))]


def test_the_constructor_says_what_is_missing(broken: Kernel) -> None:
    for ask in (fused.require_fused, fused.fused_tier):
        with pytest.raises(RuntimeError, match=TEXT):
            ask(CPU)
    with pytest.raises(RuntimeError, match=TEXT):
        AMAdamW(params(), fused=True)


def test_one_element_is_launched_once(working: Kernel) -> None:
    AMAdamW(params(), fused=True)
    assert working.launches == 3
    AMAdamW(params(), fused=True)
    assert working.launches == 3


def test_nothing_is_launched_in_a_capture(working: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "is_capturing", lambda device: True)
    monkeypatch.setattr(fused, "require_triton", lambda: None)
    assert fused.fused_tier(CPU) == fused.TRITON
    assert working.launches == 0


def test_a_converted_run_goes_on_and_warns(broken: Kernel) -> None:
    optimizer: Any = torch.optim.AdamW(params(), fused=True)
    with pytest.warns(UserWarning, match=r"becomes AMAdamW with fused=None: .*no C compiler"):
        convert_adamw(optimizer)
    assert optimizer.param_groups[0]["fused"] is None and optimizer.fused_dropped is True
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    assert "Triton" not in optimizer.describe()


def others(failed: float, fallen: float) -> Callable[[Tensor], Tensor]:
    """The sum over this rank and one that voted so."""
    return lambda mine: mine + torch.tensor([failed, fallen], dtype=mine.dtype)


def test_a_failure_of_another_rank_is_an_error_here(working: Kernel) -> None:
    assert fused.agree_on_gpu(others(0, 0), {CPU}, dropped=False)
    assert not fused.agree_on_gpu(others(0, 1), {CPU}, dropped=False)
    assert not fused.agree_on_gpu(others(0, 0), set(), dropped=True)
    with pytest.raises(RuntimeError, match="1 of the other ranks cannot build or launch Triton kernels"):
        fused.agree_on_gpu(others(1, 0), {CPU}, dropped=False)


def test_a_rank_that_fails_votes_all_the_same(broken: Kernel) -> None:
    asked: list[list[float]] = []

    def summed(votes: Tensor) -> Tensor:
        asked.append(votes.tolist())
        return votes

    with pytest.raises(RuntimeError, match=TEXT):
        fused.agree_on_gpu(summed, {CPU}, dropped=False)
    assert asked == [[1, 0]]


class Together:
    """A layout of one tensor that another rank shares, whose vote is known."""

    def __init__(self, optimizer: Any, *vote: float) -> None:
        self.rows, self.reductions, self.vote = optimizer._rows(), [object()], vote

    def all_reduce(self, packed: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        return packed, shared + torch.tensor(self.vote, dtype=shared.dtype)


def test_ranks_agree_at_the_first_step(working: Kernel) -> None:
    optimizer: Any = torch.optim.AdamW(params(), fused=True)
    convert_adamw(optimizer)
    assert optimizer.fused_dropped is False
    agree = base.AdaptiveMemoryOptimizer._agree_on_kernels
    with pytest.raises(RuntimeError, match="1 of the other ranks"):
        agree(optimizer, Together(optimizer, 1, 0))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="fused=True becomes fused=None, as on another rank"):
        agree(optimizer, Together(optimizer, 0, 1))  # type: ignore[arg-type]
    assert optimizer.param_groups[0]["fused"] is None
