"""torch.compile(optimizer.step): the step runs eagerly with the same bits, and nothing is recompiled repeatedly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from am_lightning import AMSGD, AMAdamW, clip_grad_norm_
from tests.optim.harness import assert_bitwise, compile_on_cpu, named_params, params_of, snapshot

SHAPES = [(6, 4), (9,), (3,), (70,)]
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {}),
    "chunked": (AMAdamW, {"fused": False}),
    "foreach": (AMAdamW, {"foreach": True, "scope": "global"}),
    "fused": (AMAdamW, {"fused": True}),
    "sgd": (AMSGD, {}),
}


class Counting:
    """A backend that counts graphs and runs them eagerly."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return module.forward


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(kind: str, backend: Counting | None, *, whole: bool, clips: bool = False) -> tuple[list[Any], list[int]]:
    """Make five steps at different rates; return the weights, and the numbers of frames and graphs after each step."""
    cls, options = KINDS[kind]
    optimizer = cls(named_params(SHAPES, torch.float32), lr=1e-2, **options)

    def loop() -> None:
        if clips:
            clip_grad_norm_(optimizer, 1.0, in_step=True)
        optimizer.step()

    function = loop if whole else optimizer.step
    function = function if backend is None else torch.compile(function, backend=backend)
    counted = []
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        for p in params_of(optimizer):
            p.grad = torch.randn(p.shape, generator=generator)
        function()
        optimizer.zero_grad()
        counted.append((0 if backend is None else backend.graphs) + counters["frames"]["ok"])
    return snapshot(optimizer), counted


@pytest.mark.parametrize("whole", [False, True], ids=["step", "function"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_few_graphs_and_none_twice(kind: str, whole: bool) -> None:
    backend = Counting()
    found, counted = train(kind, backend, whole=whole)
    assert backend.graphs <= (2 if kind == "AdamW" else 0)
    assert counted[1:] == [counted[1]] * 4, "compiled again after the second step"
    expected, _ = train(kind, None, whole=whole)
    if kind != "AdamW":
        assert_bitwise(found, expected)


def test_clipping_in_a_compiled_function() -> None:
    backend = Counting()
    found, counted = train("chunked", backend, whole=True, clips=True)
    assert backend.graphs == 0 and counted[1:] == [counted[1]] * 4
    assert_bitwise(found, train("chunked", None, whole=True, clips=True)[0])


def test_a_whole_training_step() -> None:
    """The model runs in graphs, and the step between them runs eagerly."""
    ends = []
    for backend in (Counting(), None):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        optimizer = AMAdamW(model.parameters(), lr=1e-2)

        def one(x: torch.Tensor, model: Any = model, optimizer: Any = optimizer) -> torch.Tensor:
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        run = one if backend is None else torch.compile(one, backend=backend)
        for seed in range(5):
            run(torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)))
            if backend is not None and seed == 1:
                made = backend.graphs
        assert backend is None or backend.graphs == made <= 4
        ends.append(snapshot(optimizer))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_the_compiled_kernels_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """fused=True through torch.compile compiles its two passes inside the step that runs eagerly."""
    compile_on_cpu(monkeypatch)
    found, _ = train("fused", Counting(), whole=False)
    assert counters["stats"]["unique_graphs"] > 0
    expected, _ = train("fused", None, whole=False)
    assert_bitwise(found, expected)
