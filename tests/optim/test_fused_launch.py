"""``fused=True`` on a GPU where Triton cannot build or launch: reported at construction, and on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from am_lightning import AMAdamW, clip_grad_norm_
from am_lightning.optim.convert import convert_adamw
from am_lightning.optim.kernels import registry, transfer
from am_lightning.optim.kernels.agreement import agree_on_kernels, drop_fused
from am_lightning.optim.kernels.cpu import build as compiler
from am_lightning.optim.kernels.registry import Choice, Kernel, kernels_for
from am_lightning.optim.kernels.triton import check as triton_check
from am_lightning.optim.kernels.triton import launch as triton_pair
from am_lightning.optim.kernels.triton import row_launch as triton_rows
from am_lightning.optim.kernels.workspace import Workspace
from tests.optim.harness import triton_on_cpu

CPU = torch.device("cpu")
KIND = triton_check.Kind(CPU)
TEXT = r"fused=True .* cannot be built or launched on cpu \(.*no C compiler\).*gcc.*Python\.h.*libcuda.*fused=None"


class StandIn:
    """Stand in for a Triton kernel that has no compiler, or for one that does nothing."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.launches = error, 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches += 1
            if self.error is not None:
                raise self.error

        return launch


def stand_in(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> StandIn:
    """Let the CPU pass for a GPU."""
    kernel = StandIn(error)
    module = SimpleNamespace(
        tl=SimpleNamespace(float32=0, float64=0), sums_kernel=kernel, reduce_kernel=kernel, update_kernel=kernel
    )
    for user in (triton_pair, triton_check):
        monkeypatch.setattr(user, "require_triton", lambda: module)
    rows = SimpleNamespace(coefficients_kernel=kernel, decide_kernel=kernel)
    monkeypatch.setattr(triton_rows, "_kernels", lambda: rows)
    triton_on_cpu(monkeypatch)
    return kernel


@pytest.fixture(autouse=True)
def looked_at_again() -> Iterator[None]:
    for cached in (triton_check.why_not, triton_check._error_of_rows):
        cached.cache_clear()
    yield
    for cached in (triton_check.why_not, triton_check._error_of_rows):
        cached.cache_clear()


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Install kernels that cannot be built."""
    monkeypatch.setenv("PATH", "")
    return stand_in(monkeypatch, RuntimeError("Failed to find\nno C compiler"))


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Install kernels that can be launched and do nothing."""
    return stand_in(monkeypatch, None)


@pytest.fixture
def working(idle: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Install kernels whose results are taken for right, because the interpreter's tests check those."""
    look = triton_check._difference
    monkeypatch.setattr(triton_check, "_difference", lambda kind: look(kind)[:0])
    return idle


def params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3))]


def test_the_constructor_says_what_is_missing(broken: StandIn) -> None:
    for ask in (lambda: registry.require_fused(CPU), lambda: registry.require_kernel(KIND)):
        with pytest.raises(RuntimeError, match=TEXT):
            ask()
    with pytest.raises(RuntimeError, match=TEXT):
        AMAdamW(params(), fused=True)


def test_wrong_numbers_are_an_error(idle: StandIn) -> None:
    with pytest.raises(RuntimeError, match=r"differ from the plain kernels \(.*\bd by .*\bx by .*fused=None"):
        AMAdamW(params(), fused=True)


def test_a_small_step_is_made_once(working: StandIn) -> None:
    AMAdamW(params(), fused=True)
    made = working.launches
    assert made > 0
    AMAdamW(params(), fused=True)
    assert working.launches == made


def test_nothing_is_launched_in_a_capture(working: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "is_capturing", lambda device: True)
    AMAdamW(params(), fused=True)
    assert working.launches == 0


def test_a_converted_run_resumes_and_warns(broken: StandIn) -> None:
    optimizer: Any = torch.optim.AdamW(params(), fused=True)
    with pytest.warns(UserWarning, match=r"becomes AMAdamW with fused=None: .*no C compiler"):
        convert_adamw(optimizer)
    assert optimizer.param_groups[0]["fused"] is None and optimizer.fused_dropped is True
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    assert "chunked for 1 (no fused kernel: those for torch.float32 cannot be built" in optimizer.describe()


class Together:
    """A layout that another rank with a known vote shares.

    A vote counts three things: fused asked for and failed, fused by default and failed, fallen back.
    """

    def __init__(self, optimizer: Any, *vote: float) -> None:
        params = optimizer.param_layout.logical_params(optimizer.param_groups)
        self.logical_params, self.reductions = params, [object()]
        self.vote, self.own = (*vote, *[0.0] * (3 - len(vote))), []

    def all_reduce(self, packed: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        self.own.append(shared.tolist())
        return packed, shared + torch.tensor(self.vote, dtype=shared.dtype)


def agree(optimizer: Any, *vote: float) -> Together:
    """Run the agreement of the first step with another rank's vote, as ``step`` does."""
    layout: Any = Together(optimizer, *vote)
    if not agree_on_kernels(layout, optimizer.param_groups, optimizer._workspace, optimizer.fused_dropped, None):
        drop_fused(optimizer.param_groups)
    return layout


def default_of(optimizer: Any) -> Kernel:
    space: Workspace = optimizer._workspace
    default = registry.fused_kernel(CPU) if "cpu" in space.fused_by_default else None
    return kernels_for(CPU, Choice(None, None), default)[0]


def test_the_default_needs_triton_on_every_rank(working: StandIn) -> None:
    optimizer: Any = AMAdamW(params())
    agree(optimizer, 0, 1)
    assert optimizer._workspace.why_no_fused == "it does not work on 1 of the other ranks"
    assert default_of(optimizer) is not registry.TRITON
    agree(optimizer)  # another layout of the same optimizer
    assert default_of(optimizer) is not registry.TRITON
    other: Any = AMAdamW(params())
    agree(other)
    assert default_of(other) is registry.TRITON


def test_a_rank_that_fails_votes_all_the_same(broken: StandIn) -> None:
    optimizer: Any = AMAdamW(params())
    optimizer.param_groups[0]["fused"] = True
    layout: Any = Together(optimizer)
    with pytest.raises(RuntimeError, match=TEXT):
        agree_on_kernels(layout, optimizer.param_groups, optimizer._workspace, None, None)
    assert layout.own == [[1, 0, 0]]


def test_ranks_agree_at_the_first_step(working: StandIn) -> None:
    optimizer: Any = torch.optim.AdamW(params(), fused=True)
    convert_adamw(optimizer)
    assert optimizer.fused_dropped is False
    with pytest.raises(RuntimeError, match="it does not work on 1 of the other ranks"):
        agree(optimizer, 1)
    with pytest.warns(UserWarning, match="fused=True becomes fused=None, because another rank"):
        agree(optimizer, 0, 1, 1)
    assert optimizer.param_groups[0]["fused"] is None


def test_a_rank_that_lacks_the_cpp_loop_stops_all() -> None:
    optimizer: Any = AMAdamW(params(), fused=True)
    agree(optimizer)  # a rank with parameters elsewhere needs no C++ loop
    with pytest.raises(RuntimeError, match=r"on the CPU needs C.*it does not work on 1 of the other ranks"):
        agree(optimizer, 1)


def test_a_rank_whose_compiler_is_no_command_votes_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks wait for the vote of this rank, and must not wait forever."""
    optimizer: Any = AMAdamW(params(), fused=True)
    monkeypatch.setenv("CXX", "'g++")
    compiler.load_library.cache_clear()
    layout: Any = Together(optimizer)
    try:
        with pytest.raises(RuntimeError, match="Invalid CXX"):
            agree_on_kernels(layout, optimizer.param_groups, optimizer._workspace, None, None)
    finally:
        compiler.load_library.cache_clear()
    assert layout.own == [[1, 0, 0]]


def stepped(**options: Any) -> str:
    optimizer: Any = AMAdamW(params(), **options)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    return str(optimizer.describe())


def test_triton_is_the_default_where_it_works(working: StandIn) -> None:
    assert stepped().endswith("kernels: Triton for 1")
    converted: Any = convert_adamw(torch.optim.AdamW(params()))
    converted.param_groups[0]["params"][0].grad = torch.ones(3)
    converted.step()
    assert converted.describe().endswith("kernels: Triton for 1")


@pytest.mark.parametrize(
    ("options", "kernels"),
    [({"fused": False}, "chunked"), ({"foreach": True}, "foreach"), ({"foreach": False}, "single_tensor")],
)
def test_what_is_set_is_taken(idle: StandIn, options: dict[str, bool], kernels: str) -> None:
    """No fused kernel is built or tried."""
    assert stepped(**options).endswith(f"kernels: {kernels} for 1")
    assert idle.launches == 0


def test_where_triton_gives_wrong_numbers_the_default_is_another(idle: StandIn) -> None:
    assert "chunked for 1 (no fused kernel: on cpu those for torch.float32 differ from" in stepped()


def test_dtypes_that_the_device_lacks_are_seen_at_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only bfloat16 is missing on this GPU; float32 works, so construction cannot find the fault."""
    stand_in(monkeypatch, None)
    monkeypatch.setattr(triton_check, "_difference", lambda kind: "no bfloat16 here" if torch.bfloat16 in kind else "")
    optimizer = AMAdamW([torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))], fused=True)
    with pytest.raises(RuntimeError, match="no bfloat16 here"):
        optimizer.current_layout()
    assert "no bfloat16 here" in stepped(exp_avg_dtype=torch.bfloat16)


def test_nothing_is_tried_in_a_capture(working: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "is_capturing", lambda device: True)
    optimizer = AMAdamW(params())
    for first in (optimizer.step, lambda: clip_grad_norm_(optimizer, 1.0)):
        with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
            first()
    assert working.launches == 0


def test_a_lack_of_memory_is_not_remembered(working: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's check has no memory: that optimizer uses no fused kernels, and the next one checks again."""
    look, full = triton_check._difference, [True]

    def crowded(kind: triton_check.Kind) -> str:
        if full[0]:
            raise torch.OutOfMemoryError("no room for the check")
        return look(kind)

    monkeypatch.setattr(triton_check, "_difference", crowded)
    with pytest.raises(torch.OutOfMemoryError):
        triton_check.why_not(KIND)
    assert "no room for the check" in stepped()
    full[0] = False
    assert stepped().endswith("kernels: Triton for 1")
