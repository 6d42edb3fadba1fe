"""Functions that torch.compile leaves as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def uncompiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``torch.compiler.disable``, which imports the compiler, at the first call and not while this package is imported.

    torch.optim imports it when an optimizer is made. A call costs a microsecond more.
    """
    disabled: list[Callable[_P, _R]] = []

    @functools.wraps(function)
    def outside(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return outside
