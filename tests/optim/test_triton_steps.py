"""Whole steps of AMAdamW(fused=True) through the Triton kernels: interpreted on the CPU, and the host's part."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from am_lightning import AMAdamW, clip_grad_norm_
from am_lightning.optim import squares
from am_lightning.optim.kernels.inputs import GroupOptions, LocalShard
from am_lightning.optim.kernels.triton import launch as triton_pair
from am_lightning.optim.kernels.triton import row_launch as triton_rows
from am_lightning.optim.kernels.triton import tables as triton_tables
from am_lightning.optim.kernels.workspace import Workspace
from tests.optim.harness import triton_on_cpu
from tests.optim.launches import Launches
from tests.optim.test_no_sync import step_unread
from tests.sharding.pool import Pool

pytest.importorskip("triton")


def check(interpreter: Pool, name: str, **arguments: Any) -> None:
    interpreter.run(f"tests.optim.interpreted_steps:{name}", **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "scope", "dtype"),
    [("paper", "tensor", "float32"), ("groups", "group", "float32"), ("maximize", "global", "float64")],
)
def test_every_step_beside_the_oracle(interpreter: Pool, variant: str, scope: str, dtype: str) -> None:
    check(interpreter, "beside_oracle", variant=variant, scope=scope, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["tensor", "group", "global"])
def test_mixed_dtypes_and_strides_beside_the_reference(interpreter: Pool, scope: str) -> None:
    check(interpreter, "beside_reference", scope=scope)


def test_a_bad_step_leaves_no_trace(interpreter: Pool) -> None:
    check(interpreter, "a_bad_step_leaves_no_trace")


@pytest.mark.slow
@pytest.mark.parametrize("exp_avg_dtype", [None, "bfloat16"])
def test_runs_repeat_to_the_bit(interpreter: Pool, exp_avg_dtype: str | None) -> None:
    check(interpreter, "again_and_resumed", exp_avg_dtype=exp_avg_dtype)


def test_the_default_is_triton_where_its_numbers_are_right(interpreter: Pool) -> None:
    check(interpreter, "default_where_it_agrees")


def test_the_check_of_the_first_step_sees_small_errors(interpreter: Pool) -> None:
    check(interpreter, "no_default_where_it_differs")


def test_low_precision_direction(interpreter: Pool) -> None:
    check(interpreter, "low_precision_direction")


def test_clipping_in_registers(interpreter: Pool) -> None:
    check(interpreter, "clipping_in_registers")


def test_a_tensor_lr_is_read_on_the_device(interpreter: Pool) -> None:
    check(interpreter, "tensor_lr")


class Idle:
    """Stand in for kernels and count their launches."""

    launches = 0

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches += 1

        return launch


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Idle:
    """Run the host's part of the Triton path on CPU tensors, computing nothing."""
    idle = Idle()
    names = ("sums_kernel", "reduce_kernel", "update_kernel")
    module = SimpleNamespace(tl=SimpleNamespace(float32=0, float64=0, bfloat16=0), **dict.fromkeys(names, idle))
    rows = SimpleNamespace(coefficients_kernel=idle, decide_kernel=idle)
    monkeypatch.setattr(triton_rows, "_kernels", lambda: rows)
    monkeypatch.setattr(triton_pair, "require_triton", lambda: module)
    triton_on_cpu(monkeypatch, why_not=lambda kind: "")
    return idle


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("scope", ["tensor", "group", "global"])
def test_the_host_reads_nothing(no_kernels: Idle, scope: str, lr: Any) -> None:
    params = [torch.nn.Parameter(torch.ones(9, 3)) for _ in range(3)]
    params += [torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
    optimizer = AMAdamW(groups, lr=lr, capturable=True, scope=scope, fused=True)
    for step in range(1, 4):
        for i, p in enumerate(params):
            p.grad = None if (i, step) == (0, 2) else torch.full_like(p, float(step))
        step_unread(optimizer)
    assert "Triton for 4" in optimizer.describe()


class Operations(TorchDispatchMode):
    """Count the operators that would be launched in addition to the kernels."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_step_of_more_tensors_is_not_more_operations(no_kernels: Idle) -> None:
    counts = []
    for size in (3, 90):
        params = [torch.nn.Parameter(torch.ones(9)) for _ in range(size)]
        optimizer = AMAdamW(params, fused=True)
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            with Operations() as operations:
                optimizer.step()
        counts.append(operations.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("scope", ["tensor", "group", "global"])
@pytest.mark.parametrize("clips", [False, True], ids=["plain", "clipped"])
def test_a_step_of_300_tensors_is_few_launches(
    no_kernels: Idle, clips: bool, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches are counted by torch's rules for lists; the host's calls of operators include views and allocations."""
    monkeypatch.setattr(squares, "_in_blocks", lambda device: False)
    params = [torch.nn.Parameter(torch.ones(8 + i % 5, 6)) for i in range(300)]
    optimizer = AMAdamW([{"params": params[:200]}, {"params": params[200:], "lr": 0.1}], scope=scope)
    for _ in range(4):
        for p in params:
            p.grad = torch.ones_like(p)
        no_kernels.launches = 0
        with Operations() as operations, Launches() as launches:
            if clips:
                clip_grad_norm_(optimizer, 1.0, in_step=True)
            optimizer.step()
    assert "Triton for 300" in optimizer.describe()
    assert no_kernels.launches == 5
    assert launches.total + no_kernels.launches <= (12 if clips else 6), launches.by_name
    assert operations.count + no_kernels.launches <= 60


def test_gradients_live_until_the_step_is_done(no_kernels: Idle) -> None:
    """The tables hold addresses only: a gradient copied for the step must live until its kernels have run."""
    tensors = [torch.zeros(4) for _ in range(4)]
    watched = weakref.ref(tensors[1])
    x, g, d, v = tensors
    shard = LocalShard(0, x, g, d, v, GroupOptions(0.9, 0.1, 0.0, 0.0, False))
    passes = triton_pair.TritonPasses([shard], Workspace())
    passes.begin()
    del tensors, shard, x, g, d, v
    assert watched() is not None
    del passes
    assert watched() is None


def test_what_is_kept_is_bounded(no_kernels: Idle) -> None:
    """Every step has a new set of gradients, as with experts that take turns."""
    tables = triton_pair.Tables()
    for row in range(100):
        tensors = [torch.zeros(4) for _ in range(4)]
        tables.prepare([LocalShard(row, *tensors, GroupOptions(0.9, 0.1, 0.0, 0.0, False))])
    assert len(tables._groups) <= 32


def test_a_captured_copy_is_apart_from_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph fills a table of its own from a buffer of its own at every replay; eager steps never use it."""
    following = triton_tables.Following(torch.device("cpu"), torch.int64)
    monkeypatch.setattr(triton_tables.Following, "_buffer", lambda self, numel: torch.empty(numel, dtype=torch.int64))
    captured: list[Any] = []
    eager = following.follow([1, 2], captured)
    assert not captured
    with monkeypatch.context() as capture:
        capture.setattr(triton_tables, "is_capturing", lambda device: True)
        tables = [following.follow([3, 4], captured), following.follow([1, 2], captured)]
    assert [table.tolist() for table in tables] == [[3, 4], [1, 2]]
    assert len(captured) == 4 and all(any(table is kept for kept in captured) for table in tables)
    assert following.follow([1, 2], captured) is eager


def test_a_capture_before_any_step_is_refused(no_kernels: Idle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tables, "is_capturing", lambda device: True)
    piece = LocalShard(0, *(torch.zeros(4) for _ in range(4)), GroupOptions(0.9, 0.1, 0.0, 0.0, False))
    with pytest.raises(RuntimeError, match="1 tensors in it have never stepped together: make a step"):
        triton_pair.TritonPasses([piece], Workspace()).begin()
