"""Accepted and refused values of every constructor argument, as hypothesis strategies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from am_lightning import AMSGD, AMAdamW

NONE = st.none()
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf, 10**400, -(10**400)])
BELOW_ZERO = st.floats(max_value=0, exclude_max=True) | st.integers(max_value=-1)
NOT_NUMBERS = st.one_of(
    st.booleans(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.complex_numbers(),
    st.lists(st.floats(0, 0.5), max_size=2),
    st.sampled_from([object, {}, (0.1,), {0.1}]),
)
NOT_BOOLS = st.one_of(
    st.integers(), st.floats(), st.text(max_size=5), st.lists(st.booleans()), st.sampled_from([{}, object])
)
NOT_STRINGS = st.one_of(st.none(), st.booleans(), st.integers(), st.binary(max_size=3), st.lists(st.text(max_size=3)))
LR_TENSORS = st.floats(0, 1, width=32).flatmap(
    lambda lr: st.sampled_from([torch.tensor(lr), torch.tensor([lr]), torch.tensor([[lr]], dtype=torch.float64)])
)
BAD_LR_TENSORS = st.sampled_from(
    [
        torch.tensor(math.nan),
        torch.tensor(-math.inf),
        torch.tensor(-1e-3),
        torch.tensor([0.1, 0.1]),
        torch.empty(0),
        torch.tensor(1j),
        torch.tensor(True),
    ]
)


NUMPY_NUMBERS = st.floats(0, 1, width=32).flatmap(
    lambda number: st.sampled_from([np.float32(number), np.float64(number), np.float16(number)])
)


@dataclass(frozen=True)
class Argument:
    """`good` values are accepted; `bad` ones raise an error that contains each of `words`."""

    good: st.SearchStrategy[Any]
    bad: st.SearchStrategy[Any]
    words: tuple[str, ...] = ()
    per_group: bool = True


def _number(most: float = 1e3, *, tensors: bool = False) -> Argument:
    good = st.floats(0, most) | st.integers(0, int(most)) | st.fractions(0, int(most)) | NUMPY_NUMBERS
    bad = BELOW_ZERO | NOT_FINITE | NOT_NUMBERS | NONE
    if tensors:
        return Argument(good | LR_TENSORS, bad | BAD_LR_TENSORS, ("must be",))
    return Argument(good, bad | st.just(torch.tensor([0.1, 0.2])), ("must be", ">= 0"))


def _choice(*words: str, per_group: bool = True) -> Argument:
    wrong = st.text(max_size=8).filter(lambda text: text not in words)
    near = st.sampled_from([change(word) for word in words for change in (str.upper, str.title, " {}".format)])
    return Argument(st.sampled_from(words), wrong | near | NOT_STRINGS, ("must be", *map(repr, words)), per_group)


def _flag(*, optional: bool = False, per_group: bool = True) -> Argument:
    words = ("must be", "True", "False", *(["None"] if optional else []))
    if optional:
        return Argument(st.booleans() | NONE, NOT_BOOLS, words, per_group)
    return Argument(st.booleans(), NOT_BOOLS | NONE, words, per_group)


_UNIT = st.floats(0, 1, exclude_max=True) | st.just(0) | st.fractions(0, Fraction(99, 100))
_BAD_UNIT = BELOW_ZERO | NOT_FINITE | NOT_NUMBERS | NONE | st.floats(min_value=1) | st.integers(min_value=1)
BETAS = Argument(
    st.tuples(_UNIT, _UNIT) | st.lists(_UNIT, min_size=2, max_size=2),
    st.one_of(
        st.tuples(_BAD_UNIT, _UNIT),
        st.tuples(_UNIT, _BAD_UNIT),
        st.lists(_UNIT, max_size=4).filter(lambda betas: len(betas) != 2),
        st.sampled_from([0.9, None, "ab", b"ab", {0.5, 0.9}, {0.5: 1, 0.9: 2}, True]),
    ),
    ("must be",),
)
BETA_MAX = Argument(
    st.floats(0, 1) | st.sampled_from([0, 1]),
    BELOW_ZERO | NOT_FINITE | NOT_NUMBERS | NONE | st.floats(min_value=1, exclude_min=True) | st.integers(min_value=2),
    ("must be", "<= 1"),
)
REPLICA_GROUP = Argument(NONE, NOT_BOOLS | st.booleans(), ("ProcessGroup", "None"), per_group=False)

SHARED = {
    "lr": _number(tensors=True),
    "weight_decay": _number(),
    "lambd": _number(1e6),
    "scope": _choice("tensor", "group", "global", per_group=False),
    "maximize": _flag(),
    "foreach": _flag(optional=True),
    "nonfinite": _choice("skip", "propagate", per_group=False),
    "replica_group": REPLICA_GROUP,
}
ARGUMENTS: dict[type, dict[str, Argument]] = {
    AMAdamW: {
        **SHARED,
        "betas": BETAS,
        "eps": _number(),
        "capturable": _flag(),
        "fused": _flag(optional=True),
        "exp_avg_dtype": Argument(
            st.sampled_from([None, torch.bfloat16]),
            NOT_BOOLS | st.booleans() | st.sampled_from([torch.float16, torch.float32, "bfloat16"]),
            ("must be torch.bfloat16", "None"),
            per_group=False,
        ),
    },
    AMSGD: {
        **SHARED,
        "beta_max": BETA_MAX,
        "decoupled_weight_decay": _flag(),
        "loss_gap": _choice("first_order", "exact", per_group=False),
    },
}


def names_value(message: str, value: Any) -> bool:
    """Return whether the text shows the value, as str or repr write it; of a pair or a tensor one part is enough."""
    texts = {str(value), repr(value)}
    if isinstance(value, torch.Tensor):
        texts |= {str(tuple(value.shape)), str(value.dtype)} | ({str(value.item())} if value.numel() == 1 else set())
    elif isinstance(value, (list, tuple)):
        texts |= {text for part in value for text in (str(part), repr(part))}
    return any(text in message for text in texts)
