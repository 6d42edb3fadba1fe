"""The learning rate's schedules."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from am_lightning.pretrain.model.schedule import KINDS, learning_rate_factor, make_schedule
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
    factors = [learning_rate_factor(step, total, kind, warmup, decay, final) for step in range(total)]
    assert all(0 < f <= 1 or (final == 0 and f >= 0) for f in factors)
    peak = round(total * warmup)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_without_warmup_the_first_step_has_the_peak(kind: str) -> None:
    assert learning_rate_factor(0, 100, kind) == 1.0


def test_cosine_is_half_way_in_the_middle_and_ends_at_its_end() -> None:
    assert learning_rate_factor(50, 100, final_fraction=0.1) == pytest.approx(0.55)
    assert learning_rate_factor(100, 100, final_fraction=0.1) == pytest.approx(0.1)
    assert learning_rate_factor(55, 100, warmup_fraction=0.1, final_fraction=0.0) == pytest.approx(0.5)


def test_wsd_stays_then_falls_in_a_line() -> None:
    factors = [learning_rate_factor(s, 100, "wsd", 0.1, 0.2, 0.0) for s in range(101)]
    assert factors[9] == 1.0 and set(factors[9:81]) == {1.0}
    assert factors[85] == pytest.approx(0.75) and factors[90] == pytest.approx(0.5) and factors[100] == 0.0


def test_the_scheduler_follows_the_function() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = make_schedule(optimizer, 10, "wsd", 0.2, 0.5, 0.1)
    seen = []
    for _ in range(10):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([2 * learning_rate_factor(s, 10, "wsd", 0.2, 0.5, 0.1) for s in range(10)])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kind": "linear"}, "model.schedule is 'linear'; allowed: cosine or wsd or constant"),
        ({"warmup_fraction": 1.5}, "model.warmup_fraction is 1.5"),
        ({"decay_fraction": math.nan}, "model.decay_fraction is nan"),
        ({"final_fraction": -0.1}, "model.final_lr_fraction is -0.1"),
        ({"total": -1}, "trainer.max_steps is -1"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, object], named: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    with pytest.raises(RecipeError, match=named):
        make_schedule(optimizer, **{"total": 10, **arguments})


def test_a_run_before_its_fall_can_be_prolonged() -> None:
    """With "wsd" a checkpoint's schedule continues with its new length."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    short = make_schedule(optimizer, 10, "wsd", final_fraction=0.0)
    for _ in range(8):
        optimizer.step()
        short.step()
    longer = make_schedule(optimizer, 100, "wsd", final_fraction=0.0)
    longer.load_state_dict(short.state_dict())
    rates = []
    for _ in range(92):
        optimizer.step()
        longer.step()
        rates.append(longer.get_last_lr()[0])
    assert rates[:72] == [1.0] * 72
    assert rates[73] < 1.0 and rates[-1] == pytest.approx(0.0)
