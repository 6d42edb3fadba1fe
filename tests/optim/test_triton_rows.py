"""The kernels of the per-row scalars under Triton's interpreter equal ``closed_form`` and its neighbours."""

from __future__ import annotations

from typing import Any

import pytest

from tests.sharding.pool import Pool

pytest.importorskip("triton")


def check(interpreter: Pool, name: str, **arguments: Any) -> None:
    interpreter.run(f"tests.optim.interpreted_rows:{name}", **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("scope", ["tensor", "group", "global"])
def test_beside_the_closed_form(interpreter: Pool, scope: str, nonfinite: str) -> None:
    check(interpreter, "beside_closed_form", scope=scope, nonfinite=nonfinite)


def test_the_factor_of_clipping(interpreter: Pool) -> None:
    check(interpreter, "one_norm_is_clipped")


@pytest.mark.parametrize(
    ("scope", "nonfinite", "tensor_lr"),
    [("tensor", "skip", False), ("group", "propagate", True), ("global", "skip", True)],
)
def test_whole_steps_with_and_without(interpreter: Pool, scope: str, nonfinite: str, tensor_lr: bool) -> None:
    check(interpreter, "whole_steps", scope=scope, nonfinite=nonfinite, tensor_lr=tensor_lr)


def test_bits_do_not_depend_on_missing_states(interpreter: Pool) -> None:
    check(interpreter, "the_same_bits_with_and_without_missing_states")


def test_a_reset_by_hand_is_a_fresh_start(interpreter: Pool) -> None:
    check(interpreter, "a_reset_by_hand_is_a_fresh_start")
