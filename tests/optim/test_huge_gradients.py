"""A finite gradient whose square overflows: all kernels drop the step by one rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.optim import huge
from tests.optim.harness import build, compile_on_cpu, named_params, params_of
from tests.sharding.pool import Pool

# Options of AMAdamW for each kernel, and its name in describe().
KERNELS: dict[str, tuple[dict[str, Any], str]] = {
    "chunked": ({"fused": False}, "chunked for 4"),
    "single_tensor": ({"foreach": False}, "single_tensor for 4"),
    "foreach": ({"foreach": True}, "foreach for 4"),
    "cpp": ({"fused": True}, "C++ loop"),
    "compile": ({"fused": True}, "torch.compile for 4"),
}
EAGER = ["chunked", "single_tensor", "foreach"]
DTYPES = ["float32", "bfloat16", "float16", "float64"]
PLACES = [0, 2]  # a small tensor, and the end of one with several blocks


@pytest.fixture
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, Any], str]]:
    if request.param == "compile":
        compile_on_cpu(monkeypatch)
    yield KERNELS[request.param]


each_kernel = pytest.mark.parametrize("kernel", [*EAGER, "cpp"], indirect=True)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@each_kernel
@each_dtype
@pytest.mark.parametrize("at", PLACES)
def test_the_step_is_dropped(kernel: tuple[dict[str, Any], str], dtype: str, at: int) -> None:
    options, words = kernel
    huge.dropped("adamw", dtype, huge.TOO_LARGE[getattr(torch, dtype)], words, at, **options)


@each_kernel
@pytest.mark.parametrize("value", [-2e19, 1e30, -3e38])
def test_far_beyond(kernel: tuple[dict[str, Any], str], value: float) -> None:
    """P overflows as well, so that 1 / P hides it from both sums."""
    options, words = kernel
    huge.dropped("adamw", "float32", value, words, maximize=True, scope="global", **options)


@each_kernel
@each_dtype
def test_what_fits_is_taken(kernel: tuple[dict[str, Any], str], dtype: str) -> None:
    huge.taken("adamw", dtype, huge.FITS[getattr(torch, dtype)], **kernel[0])


@each_kernel
def test_with_clipping_in_the_step(kernel: tuple[dict[str, Any], str]) -> None:
    """The square of the clipped gradient decides."""
    options, words = kernel
    huge.taken("adamw", "float32", 1e30, clip=1.0, **options)
    huge.dropped("adamw", "float32", 1e30, words, clip=1e25, **options)


@each_kernel
def test_with_a_direction_in_bfloat16(kernel: tuple[dict[str, Any], str]) -> None:
    options, words = kernel
    huge.dropped("adamw", "float32", 1e30, words, exp_avg_dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("kernel", EAGER, indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_sgd_whose_sum_overflows(kernel: tuple[dict[str, Any], str], dtype: str) -> None:
    options, words = kernel
    options = {key: value for key, value in options.items() if key != "fused"}  # AMSGD has no fused kernels
    huge.dropped("sgd", dtype, 1e30, words, **options)
    huge.taken("sgd", dtype, 1e18, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["compile"], indirect=True)
def test_in_compiled_graphs(kernel: tuple[dict[str, Any], str]) -> None:
    options, words = kernel
    for dtype in (torch.float32, torch.float16):
        huge.dropped("adamw", str(dtype).partition(".")[2], huge.TOO_LARGE[dtype], words, 2, **options)
    huge.dropped("adamw", "float32", 1e30, words, clip=1e25, **options)
    huge.taken("adamw", "float32", huge.FITS[torch.float32], **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_in_triton(interpreter: Pool, dtype: str) -> None:
    for value, taken in ((huge.TOO_LARGE, False), (huge.FITS, True)):
        arguments = {"dtype": dtype, "value": value[getattr(torch, dtype)], "taken": taken}
        interpreter.run("tests.optim.interpreted_steps:huge_gradient", **arguments)


def test_adamw_freezes_the_element_and_continues() -> None:
    """torch's AdamW makes the step, and the element never moves again."""
    optimizer = torch.optim.AdamW([p for _, p in named_params(huge.SHAPES[:2], torch.float32)], lr=1e-2, weight_decay=0)
    param = params_of(optimizer)[0]
    huge.give_grads(optimizer, 0, 1e30)
    optimizer.step()
    held = param.detach().clone()
    huge.give_grads(optimizer, 1)
    optimizer.step()
    assert optimizer.state[param]["exp_avg_sq"].view(-1)[-1] == torch.inf
    assert param.view(-1)[-1] == held.view(-1)[-1] and not torch.equal(param, held)


def test_a_gradient_of_another_dtype() -> None:
    """bfloat16 weights have gradients whose squares fit in float32 only: between the largest bfloat16 and 2^128."""
    optimizer = build("adamw", named_params([(4,)], torch.bfloat16), lr=1e-2, betas=(0.89, 0.0))
    param = params_of(optimizer)[0]
    if not hasattr(param, "grad_dtype"):
        pytest.skip("gradients have the dtype of their parameter in this release of torch")
    param.grad_dtype = torch.float32
    for value, skipped in ((1.0, False), (2.0**64 - 2.0**40, True)):
        param.grad = torch.full((4,), value)
        optimizer.step()
        assert bool(optimizer.last_step_skipped) == skipped
        assert huge.is_finite(optimizer)
