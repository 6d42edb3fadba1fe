"""The learning rate's schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from am_lightning.pretrain.model.schedule import KINDS, Schedule
from am_lightning.pretrain.runtime.errors import RecipeError


@given(
    kind=st.sampled_from(KINDS),
    total=st.integers(1, 500),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_it_rises_then_falls_between_its_bounds(
    kind: str, total: int, warmup: float, decay: float, final: float
) -> None:
    schedule = Schedule(kind, warmup, decay, final)
    factors = [schedule.factor(step, total) for step in range(total)]
    assert all(0 < f <= 1 or (final == 0 and f >= 0) for f in factors)
    peak = round(total * warmup)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_has_its_own_peak_and_length(kind: str) -> None:
    def after(steps: int, lr: float, total: int, state: dict[str, Any] | None = None) -> tuple[Any, Any]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
        scheduler = Schedule(kind, warmup_fraction=0.2).scheduler(optimizer, total)
        if state is not None:
            optimizer.param_groups[0]["lr"] = 7.0  # the checkpoint's
            scheduler.load_state_dict(state)
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
        return optimizer.param_groups[0]["lr"], scheduler.state_dict()

    _, state = after(4, 1e-2, 10)
    for more in (0, 3):
        assert after(more, 1e-3, 30, state)[0] == after(4 + more, 1e-3, 30)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_without_warmup_the_first_step_has_the_peak(kind: str) -> None:
    assert Schedule(kind).factor(0, 100) == 1.0


def test_cosine_is_half_way_in_the_middle_and_ends_at_its_end() -> None:
    assert Schedule(final_fraction=0.1).factor(50, 100) == pytest.approx(0.55)
    assert Schedule(final_fraction=0.1).factor(100, 100) == pytest.approx(0.1)
    assert Schedule(warmup_fraction=0.1, final_fraction=0.0).factor(55, 100) == pytest.approx(0.5)


def test_wsd_stays_then_falls_in_a_line() -> None:
    factors = [Schedule("wsd", 0.1, 0.2, 0.0).factor(s, 100) for s in range(101)]
    assert factors[9] == 1.0 and set(factors[9:81]) == {1.0}
    assert factors[85] == pytest.approx(0.75) and factors[90] == pytest.approx(0.5) and factors[100] == 0.0


def test_the_scheduler_follows_the_function() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = Schedule("wsd", 0.2, 0.5, 0.1)
    scheduler = schedule.scheduler(optimizer, 10)
    seen = []
    for _ in range(10):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([2 * schedule.factor(s, 10) for s in range(10)])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kind": "linear"}, "model.schedule is 'linear'; allowed: cosine or wsd or constant"),
        ({"warmup_fraction": 1.5}, "model.warmup_fraction is 1.5"),
        ({"decay_fraction": math.nan}, "model.decay_fraction is nan"),
        ({"final_fraction": -0.1}, "model.final_lr_fraction is -0.1"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        Schedule(**arguments)


def test_a_wrong_length_is_named() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    with pytest.raises(RecipeError, match=r"trainer.max_steps is -1"):
        Schedule().scheduler(optimizer, -1)


def test_a_run_before_its_fall_can_be_prolonged() -> None:
    """With "wsd" a checkpoint's schedule continues with its new length."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = Schedule("wsd", final_fraction=0.0)
    short = schedule.scheduler(optimizer, 10)
    for _ in range(8):
        optimizer.step()
        short.step()
    longer = schedule.scheduler(optimizer, 100)
    longer.load_state_dict(short.state_dict())
    rates = []
    for _ in range(92):
        optimizer.step()
        longer.step()
        rates.append(longer.get_last_lr()[0])
    assert rates[:72] == [1.0] * 72
    assert rates[73] < 1.0 and rates[-1] == pytest.approx(0.0)
