"""Parameter names as a user wrote them: without what wrappers put in front."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

_WRAPPER = re.compile(
    r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|_forward_module|module)\."
)


def strip_wrappers(name: str) -> str:
    """``module._orig_mod.layers.0.weight`` -> ``layers.0.weight``: DDP, FSDP, compile, checkpoint, DeepSpeed."""
    return _WRAPPER.sub("", name)


def group_names(param_groups: Sequence[dict[str, Any]], known: dict[int, str] | None = None) -> list[list[str]]:
    """One distinct name for each parameter of each group.

    The names given to the optimizer win, then ``known`` (``id(parameter) -> name``), then ``group.index``.
    """
    known = known or {}
    result: list[list[str]] = []
    taken: set[str] = set()
    for g, group in enumerate(param_groups):
        given = group.get("param_names")
        names = []
        for i, param in enumerate(group["params"]):
            name = given[i] if given is not None and i < len(given) else known.get(id(param))
            name = f"{g}.{i}" if name is None else strip_wrappers(str(name))
            if name in taken:  # two models in one optimizer may use one name twice
                name = f"{name}#{g}.{i}"
            taken.add(name)
            names.append(name)
        result.append(names)
    return result


def names_by_id(named_parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[int, str]:
    """``id(parameter) -> name`` of ``module.named_parameters()``."""
    return {id(param): strip_wrappers(name) for name, param in named_parameters}
