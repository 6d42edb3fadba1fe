"""RunHistory: when a picture is due, and which layer dipped when."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from am_lightning.loggers.history import RunHistory
from am_lightning.optim.intervals import Interval

LAYERS = ["embed", "layers.0", "layers.1", "head"]


def interval(steps: int, *, mean: float = 0.8, lowest: tuple[float, ...] = (0.8,) * 4, at_max: int = 0) -> Interval:
    """Return an interval of four layers."""
    every = torch.full((4,), float(steps), dtype=torch.float64)
    low = torch.tensor(lowest, dtype=torch.float64)
    return Interval(every * mean, torch.full_like(every, at_max), 0 * every, every, low, torch.full_like(every, 0.85))


def nothing() -> Interval:
    zero = torch.zeros(4, dtype=torch.float64)
    return Interval(zero, zero, zero, zero, zero + math.inf, zero - math.inf)


def pictures(steps: int, every: int, total: int | None, *, life: int | None = None) -> list[int]:
    """Return the steps of a run at which pictures are drawn, with one at the end if the last step has none.

    Args:
        life: number of steps after which the run is resumed, repeatedly.
    """
    history, drawn = RunHistory(), []
    for step in range(every, steps + 1, every):
        if life and step % life == 0:
            saved, history = history.state_dict(), RunHistory()
            history.load_state_dict(saved)
        history.add(step, LAYERS, interval(every), 0.89)
        if history.picture_is_due(total):
            history._pictures += 1  # as picture() does, which takes longer
            drawn.append(step)
    return drawn


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("steps", [10, 100, 1_000, 10_000, 100_000, 1_000_000])
def test_a_run_has_some_pictures_and_never_more_than_forty(steps: int, known: bool) -> None:
    """The limit holds for any length, also if the last step is not known in advance."""
    every = max(1, steps // 1000)
    drawn = pictures(steps, every, steps if known else None)
    assert drawn[0] == every and len(drawn) + 1 <= 40
    assert len(drawn) >= min(steps // 2, 8)
    assert len(drawn) + 1 <= 20 or not known
    gaps = [(after - before) / steps for before, after in zip(drawn, [*drawn[1:], steps], strict=True)]
    assert max(gaps) <= 0.3  # the last picture before the end shows most of the run


def test_a_run_that_continues_beyond_its_total_has_no_more_than_forty() -> None:
    assert len(pictures(100_000, 100, total=1000)) <= 39


@pytest.mark.parametrize("total", [100_000, None, 1000])
def test_a_run_that_is_resumed_again_and_again_has_those_of_one_that_is_not(total: int | None) -> None:
    assert pictures(100_000, 100, total, life=500) == pictures(100_000, 100, total)


def test_a_picture_is_due_once_for_a_step_and_not_before_the_first() -> None:
    history = RunHistory()
    assert not history.picture_is_due() and history.picture("title") is None
    history.add(5, LAYERS, nothing(), 0.89)
    assert not history.picture_is_due() and history.picture("title") is None
    history.add(10, LAYERS, interval(5), 0.89)
    assert [history.picture_is_due(100), history.picture_is_due(100)] == [True, False]
    picture = history.picture("title")
    assert picture is not None and picture.ndim == 3


def test_a_picture_that_fails_is_warned_of_once() -> None:
    """Pillow has no width for a text of two lines."""
    history = RunHistory()
    with pytest.warns(UserWarning, match="no picture of the layers: ValueError") as caught:
        for step in (1, 2, 3):
            history.add(step, ["a\nb", *LAYERS[1:]], interval(1), 0.89)
            assert history.picture("title") is None
    assert len(caught) == 1 and "a\nb" in history.sentence()


def test_the_sentence_names_the_deepest_layers_and_when() -> None:
    history = RunHistory()
    assert history.sentence() == ""
    history.add(10, LAYERS, interval(10, at_max=5, lowest=(0.7, 0.8, 0.6, 0.8)), 0.89)
    history.add(11, LAYERS, interval(1, at_max=1, mean=0.7, lowest=(0.9, 0.05, 0.6, 0.8)), 0.89)
    history.add(30, LAYERS, interval(19, lowest=(0.75, 0.1, 0.3, 0.8)), 0.89)
    assert history.sentence() == (
        "mean beta_t 0.797, at the cap in 20% of the tensors' steps; lowest: layers.0 0.050 in step 11, "
        "layers.1 0.300 in steps 12 to 30, embed 0.700 in steps 1 to 10"
    )


def test_a_layer_that_is_a_number_is_told_from_a_value() -> None:
    """Layers of an ``nn.Sequential`` have numbers as names."""
    history = RunHistory()
    history.add(50, ["0", "2", "4", "head.0"], interval(50, lowest=(0.5, 0.0, 0.7, 0.6)), 0.89)
    told = "layer 2 0.000 in steps 1 to 50", "layer 0 0.500 in steps 1 to 50", "head.0 0.600 in steps 1 to 50"
    assert history.sentence().endswith(f"lowest: {', '.join(told)}")
    assert history._map is not None
    above = history._map._deepest(["0", "2", "4", "head.0"])
    assert tuple(map(" ".join, above)) == told  # above the picture


def test_a_resumed_run_begins_after_its_checkpoint() -> None:
    """Without a history it begins at the checkpoint's step, with one at the last reading."""
    without = RunHistory()
    without.begin(100)
    without.add(150, LAYERS, interval(50), 0.89)
    assert "in steps 101 to 150" in without.sentence()
    with_one = RunHistory()
    with_one.load_state_dict(copy.deepcopy(without.state_dict()))
    with_one.begin(173)
    with_one.add(200, LAYERS, interval(50, lowest=(0.8, 0.8, 0.1, 0.8)), 0.89)
    assert "layers.1 0.100 in steps 151 to 200" in with_one.sentence()


@pytest.mark.parametrize("resumed", [False, True], ids=["in the process", "of a loaded history"])
def test_a_return_to_an_earlier_step_leaves_the_steps_since_out_of_the_sentence(resumed: bool) -> None:
    """A layer whose deepest dip is removed shows the one before."""
    history, plain = RunHistory(), RunHistory()
    for step, lowest in ((10, (0.7, 0.8, 0.6, 0.8)), (20, (0.3, 0.5, 0.75, 0.8)), (30, (0.1, 0.8, 0.2, 0.8))):
        history.add(step, LAYERS, interval(10, mean=0.02 * step, at_max=step // 10, lowest=lowest), 0.89)
    if resumed:
        saved, history = history.state_dict(), RunHistory()
        history.load_state_dict(saved)
    history.begin(20)
    for step, lowest in ((10, (0.7, 0.8, 0.6, 0.8)), (20, (0.3, 0.5, 0.75, 0.8))):
        plain.add(step, LAYERS, interval(10, mean=0.02 * step, at_max=step // 10, lowest=lowest), 0.89)
    assert history.sentence() == plain.sentence()
    for each in (history, plain):
        each.add(30, LAYERS, interval(10, lowest=(0.4, 0.4, 0.8, 0.8)), 0.89)
    assert history.sentence() == plain.sentence()
    assert history.sentence().endswith(
        "embed 0.300 in steps 11 to 20, layers.0 0.400 in steps 21 to 30, layers.1 0.600 in steps 1 to 10"
    )


def test_its_state_is_the_run_so_far_and_later_readings_do_not_change_it() -> None:
    history = RunHistory()
    for step in (10, 20, 30):
        history.add(step, LAYERS, interval(10, lowest=(0.1, 0.2, 0.3, 1 / step)), 0.89)
    saved, told, drawn = history.state_dict(), history.sentence(), history.picture("title")
    history.add(40, LAYERS, interval(10, lowest=(0.01,) * 4), 0.89)
    again = RunHistory()
    again.load_state_dict(saved)
    assert again.sentence() == told != history.sentence()
    unread = RunHistory()
    unread.load_state_dict(again.state_dict())  # before its first reading
    again.add(40, LAYERS, nothing(), 0.89)
    picture: Any = again.picture("title")
    assert picture.shape == drawn.shape and (unread.picture("title") == drawn).all()
    assert again.sentence() == told


def test_it_does_not_grow_with_the_run() -> None:
    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel()
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        return sum(map(size, value)) if isinstance(value, list | tuple) else 1

    history, sizes = RunHistory(), []
    for step in range(1, 2001):
        history.add(step, LAYERS, interval(1, lowest=(0.8, 0.8 - step / 4000, 0.8, 0.8)), 0.89)
        if step in (500, 2000):
            sizes.append(size(history.state_dict()))
    assert sizes[1] <= sizes[0] * 1.1
