"""Error messages for unknown arguments, which say what to write instead."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

LAMBDA = ("lambda_", "lam", "lmbda", "lamda")  # lambda itself is a keyword of Python

_ADAMWS = {
    **dict.fromkeys(("learning_rate", "learningrate"), "write lr=..."),
    **dict.fromkeys(LAMBDA, "write lambd=..."),
    **dict.fromkeys(("wd", "decay", "l2"), "write weight_decay=..."),
    "epsilon": "write eps=...",
    "differentiable": "step() cannot be differentiated through: leave it out",
    "decay_embeddings": "an argument of am_lightning.am_adamw and am_sgd, which take a model",
    "overrides": "an argument of am_lightning.am_adamw and am_sgd, which take a model",
    "named_parameters": "pass them as params, which may be (name, parameter) pairs",
}
_CAP = "the cap of beta_t and the second moment's decay are betas=(cap, beta2)"
ADAMW = {
    **_ADAMWS,
    **dict.fromkeys(("beta1", "beta", "beta2", "beta_max", "beta1_max", "momentum"), _CAP),
    "amsgrad": "adaptive memory has no amsgrad form: leave it out",
    "decoupled_weight_decay": "AMAdamW's weight decay always is: leave it out",
}
SGD = {
    **_ADAMWS,
    **dict.fromkeys(("momentum", "beta", "beta1_max", "betas"), "the momentum is computed, its cap is beta_max=..."),
    **dict.fromkeys(("dampening", "nesterov"), "adaptive memory has no such form: leave it out"),
    **dict.fromkeys(("fused", "capturable"), "AMSGD has no such kernels: leave it out"),
}


def with_hints(hints: Mapping[str, str], keywords: str) -> Callable[[F], F]:
    """Decorate a function so that its TypeError for unknown or too many arguments ends with a hint.

    Args:
        hints: ``name -> hint`` for arguments that the function does not have.
        keywords: how to write arguments that were wrongly passed by position.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        known = [name for name in signature.parameters if name != "self"]
        taken = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in signature.parameters.values())

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if len(args) > taken or not kwargs.keys() <= set(known):
                who = type(args[0]).__name__ if "self" in signature.parameters else function.__name__
                raise TypeError(f"{who} {_slip(args[taken:], kwargs.keys() - set(known))}")
            return function(*args, **kwargs)

        def _slip(more: Sequence[Any], wrong: Set[str]) -> str:
            if more:
                return f"does not take {', '.join(map(_short, more))} as positional: write {keywords}"
            name = min(wrong)
            near = difflib.get_close_matches(name, known, 1)
            otherwise = f"write {near[0]}=..." if near else f"its arguments are {', '.join(known)}"
            return f"has no argument {name!r}: {hints.get(name, otherwise)}"

        return cast(F, checked)

    return decorate


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
