"""Parameter names without the prefixes that wrappers add."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

_WRAPPER = re.compile(
    r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|_forward_module|module)\."
)


def strip_wrappers(name: str) -> str:
    """Remove the prefixes of DDP, FSDP, compile, checkpoint and DeepSpeed: ``module._orig_mod.net.0`` -> ``net.0``."""
    return _WRAPPER.sub("", name)


def group_names(param_groups: Sequence[dict[str, Any]], known: dict[int, str] | None = None) -> list[list[str]]:
    """Return a distinct name for each parameter of each group.

    A name given to the optimizer has priority, then a name in ``known`` (``id(parameter) -> name``), then
    ``group.index``.
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
    """Return ``id(parameter) -> name`` of ``module.named_parameters()``."""
    return {id(param): strip_wrappers(name) for name, param in named_parameters}
