"""``fused=True`` on a GPU where Triton cannot build or launch: said when the optimizer is made, and on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from am_lightning import AMAdamW, clip_grad_norm_
from am_lightning.optim import base
from am_lightning.optim.convert import convert_adamw
from am_lightning.optim.kernels import fused
from am_lightning.optim.kernels.plan import Choice, tiers
from am_lightning.optim.kernels.triton import check as triton_check
from am_lightning.optim.kernels.triton import launch as triton_pair
from am_lightning.optim.kernels.triton import row_launch as triton_rows

CPU = torch.device("cpu")
KIND = triton_check.Kind(CPU)
TEXT = r"fused=True .* cannot be built or launched on cpu \(.*no C compiler\).*gcc.*Python\.h.*libcuda.*fused=None"


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
    """The CPU passes for a GPU."""
    kernel = Kernel(error)
    module = SimpleNamespace(
        tl=SimpleNamespace(float32=0, float64=0), sums_kernel=kernel, reduce_kernel=kernel, update_kernel=kernel
    )
    for user in (triton_pair, triton_check):
        monkeypatch.setattr(user, "require_triton", lambda: module)
    rows = SimpleNamespace(coefficients_kernel=kernel, decide_kernel=kernel)
    monkeypatch.setattr(triton_rows, "_kernels", lambda: rows)
    monkeypatch.setattr(fused, "TRITON_DEVICES", {"cpu"})
    return kernel


@pytest.fixture(autouse=True)
def looked_at_anew() -> Iterator[None]:
    for cached in (triton_check.why_not, triton_check._error_of_rows):
        cached.cache_clear()
    yield
    for cached in (triton_check.why_not, triton_check._error_of_rows):
        cached.cache_clear()


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Kernels that cannot be built."""
    monkeypatch.setenv("PATH", "")
    return stand_in(monkeypatch, RuntimeError("Failed to find\nno C compiler"))


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Kernels that are launched and do nothing."""
    return stand_in(monkeypatch, None)


@pytest.fixture
def working(idle: Kernel, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Kernels whose numbers are taken for right: the interpreter's tests look at those."""
    look = triton_check._difference
    monkeypatch.setattr(triton_check, "_difference", lambda kind: look(kind)[:0])
    return idle


def params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3))]


def test_the_constructor_says_what_is_missing(broken: Kernel) -> None:
    for ask in (fused.require_fused, fused.fused_tier):
        with pytest.raises(RuntimeError, match=TEXT):
            ask(CPU)
    with pytest.raises(RuntimeError, match=TEXT):
        AMAdamW(params(), fused=True)


def test_wrong_numbers_are_an_error(idle: Kernel) -> None:
    with pytest.raises(RuntimeError, match=r"differ from the plain kernels \(.*\bd by .*\bx by .*fused=None"):
        AMAdamW(params(), fused=True)


def test_a_small_step_is_made_once(working: Kernel) -> None:
    AMAdamW(params(), fused=True)
    made = working.launches
    assert made > 0
    AMAdamW(params(), fused=True)
    assert working.launches == made


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
    assert "blocked for 1 (no Triton: those for torch.float32 cannot be built" in optimizer.describe()


def others(*votes: float) -> Callable[[Tensor], Tensor]:
    """The sum over this rank and one that voted so: asked and failed, default and failed, fallen back."""
    return lambda mine: mine + torch.tensor(votes, dtype=mine.dtype)


def test_a_failure_of_another_rank_is_an_error_here(working: Kernel) -> None:
    assert fused.agree_on_gpu(others(0, 0, 0), {KIND}, {KIND}, dropped=False) == (True, "")
    assert not fused.agree_on_gpu(others(0, 0, 1), {KIND}, set(), dropped=False).fused
    assert not fused.agree_on_gpu(others(0, 0, 0), set(), set(), dropped=True).fused
    with pytest.raises(RuntimeError, match="it does not work on 1 of the other ranks"):
        fused.agree_on_gpu(others(1, 0, 0), {KIND}, set(), dropped=False)


def test_the_default_needs_triton_on_every_rank(working: Kernel) -> None:
    agreed = fused.agree_on_gpu(others(0, 1, 0), set(), {KIND}, dropped=False)
    assert agreed == (True, "it does not work on 1 of the other ranks")


def test_a_rank_that_fails_votes_all_the_same(broken: Kernel) -> None:
    asked: list[list[float]] = []

    def summed(votes: Tensor) -> Tensor:
        asked.append(votes.tolist())
        return votes

    with pytest.raises(RuntimeError, match=TEXT):
        fused.agree_on_gpu(summed, {KIND}, {KIND}, dropped=False)
    assert asked == [[1, 1, 0]]


class Together:
    """A layout of one tensor that another rank shares, whose vote is known."""

    def __init__(self, optimizer: Any, *vote: float) -> None:
        self.rows, self.reductions, self.vote = optimizer._rows(), [object()], vote

    def all_reduce(self, packed: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        return packed, shared + torch.tensor(self.vote, dtype=shared.dtype)


def agree(optimizer: Any, *vote: float) -> None:
    base.AdaptiveMemoryOptimizer._agree_on_kernels(optimizer, Together(optimizer, *vote))  # type: ignore[arg-type]


def test_ranks_agree_at_the_first_step(working: Kernel) -> None:
    optimizer: Any = torch.optim.AdamW(params(), fused=True)
    convert_adamw(optimizer)
    assert optimizer.fused_dropped is False
    with pytest.raises(RuntimeError, match="1 of the other ranks"):
        agree(optimizer, 1, 0, 0)
    with pytest.warns(UserWarning, match="fused=True becomes fused=None, as on another rank"):
        agree(optimizer, 0, 1, 1)
    assert optimizer.param_groups[0]["fused"] is None


def stepped(**options: Any) -> str:
    optimizer: Any = AMAdamW(params(), **options)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    return str(optimizer.describe())


def test_triton_is_the_default_where_it_works(working: Kernel) -> None:
    assert stepped().endswith("kernels: Triton for 1")
    converted: Any = convert_adamw(torch.optim.AdamW(params()))
    converted.param_groups[0]["params"][0].grad = torch.ones(3)
    converted.step()
    assert converted.describe().endswith("kernels: Triton for 1")


@pytest.mark.parametrize(
    ("options", "kernels"),
    [({"fused": False}, "blocked"), ({"foreach": True}, "foreach"), ({"foreach": False}, "reference")],
)
def test_what_is_set_is_taken(idle: Kernel, options: dict[str, bool], kernels: str) -> None:
    """And nothing is built or tried for it."""
    assert stepped(**options).endswith(f"kernels: {kernels} for 1")
    assert idle.launches == 0


def test_where_triton_gives_wrong_numbers_the_default_is_another(idle: Kernel) -> None:
    assert "blocked for 1 (no Triton: on cpu those for torch.float32 differ from" in stepped()


def test_a_rank_without_triton_decides_for_all(working: Kernel) -> None:
    optimizer: Any = AMAdamW(params())
    agree(optimizer, 0, 1, 0)
    assert tiers(CPU, Choice(None, None), optimizer._workspace)[0] != fused.TRITON
    agree(optimizer, 0, 0, 0)  # another layout of the same optimizer
    assert tiers(CPU, Choice(None, None), optimizer._workspace)[0] != fused.TRITON


def test_dtypes_that_the_device_lacks_are_seen_at_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 on a GPU that has none: float32 works there, so nothing is known when the optimizer is made."""
    stand_in(monkeypatch, None)
    monkeypatch.setattr(triton_check, "_difference", lambda kind: "no bfloat16 here" if torch.bfloat16 in kind else "")
    optimizer = AMAdamW([torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))], fused=True)
    with pytest.raises(RuntimeError, match="no bfloat16 here"):
        optimizer.current_layout()
    assert "no bfloat16 here" in stepped(exp_avg_dtype=torch.bfloat16)


def test_nothing_is_tried_in_a_capture(working: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "is_capturing", lambda device: True)
    optimizer = AMAdamW(params())
    for first in (optimizer.step, lambda: clip_grad_norm_(optimizer, 1.0)):
        with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
            first()
    assert working.launches == 0


def test_a_lack_of_memory_is_not_remembered(working: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's check found no room: that optimizer does without, and the next one looks again."""
    look, full = triton_check._difference, [True]

    def crowded(kind: triton_check.Kind) -> str:
        if full[0]:
            raise torch.OutOfMemoryError("no room for the check")
        return look(kind)

    monkeypatch.setattr(triton_check, "_difference", crowded)
    with pytest.raises(torch.OutOfMemoryError):
        triton_check.why_not(KIND)
    assert fused.agree_on_gpu(None, [], [KIND], dropped=False).why_not == "no room for the check"
    full[0] = False
    assert fused.agree_on_gpu(None, [], [KIND], dropped=False).why_not == ""
