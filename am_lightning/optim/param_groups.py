"""am_adamw and am_sgd: an optimizer for a module, with named decay and no-decay groups."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from am_lightning.distributed.names import strip_wrappers
from am_lightning.distributed.strategies import logical_ndims
from am_lightning.optim import AMSGD, AMAdamW

_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    *((nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()),
)
_ADAMW_OPTIONS = (
    "lr",
    "betas",
    "beta1_max",
    "eps",
    "weight_decay",
    "lambd",
    "maximize",
    "foreach",
    "capturable",
    "fused",
)
_SGD_OPTIONS = ("lr", "beta_max", "weight_decay", "lambd", "decoupled_weight_decay", "maximize", "foreach")

Overrides = Mapping[str, Mapping[str, Any]]


def am_adamw(
    model: nn.Module,
    lr: float | Tensor = 1e-3,
    weight_decay: float = 1e-2,
    *,
    decay_embeddings: bool = True,
    overrides: Overrides | None = None,
    **options: Any,
) -> AMAdamW:
    """AMAdamW for a module: its parameters by name, without weight decay for norms, biases and 1-D parameters.

    Args:
        model: the module; parameters that need no gradient are left out.
        lr: learning rate of all groups.
        weight_decay: of the others; it is 0 for norms, biases and 1-D parameters.
        decay_embeddings: False leaves the weights of embeddings without weight decay, too.
        overrides: ``{pattern: {option: value}}``. A regular expression searched in the parameter's name; the options of
            all patterns that match are taken, later ones win. Example: ``{r"lm_head": {"lr": 1e-4}}``.
        **options: keywords of ``AMAdamW``.

    Raises:
        ValueError: nothing to train, a pattern that matches nothing or is no regular expression, an unknown option;
            parameters of an FSDP1 module that is around ``model``, or flat ones, whose shapes are not known.
        TypeError: ``model`` is not a module, ``overrides`` not a mapping of mappings.
    """
    groups = parameter_groups(
        model, weight_decay, decay_embeddings=decay_embeddings, overrides=_checked(overrides, _ADAMW_OPTIONS)
    )
    return AMAdamW(groups, lr=lr, weight_decay=weight_decay, **options)


def am_sgd(
    model: nn.Module,
    lr: float | Tensor = 1e-3,
    weight_decay: float = 0.0,
    *,
    decay_embeddings: bool = True,
    overrides: Overrides | None = None,
    **options: Any,
) -> AMSGD:
    """AMSGD for a module; arguments as in ``am_adamw``, ``**options`` are keywords of ``AMSGD``.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type, or a pattern of ``overrides`` matches
            no parameter.
    """
    groups = parameter_groups(
        model, weight_decay, decay_embeddings=decay_embeddings, overrides=_checked(overrides, _SGD_OPTIONS)
    )
    return AMSGD(groups, lr=lr, weight_decay=weight_decay, **options)


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_embeddings: bool = True, overrides: Overrides | None = None
) -> list[dict[str, Any]]:
    """Param groups of named parameters for any torch optimizer, decay first, then no decay, then one for each override.

    Returns:
        ``[{"params": [(name, parameter), ...], "weight_decay": w, ...}, ...]`` in the order of the module's parameters;
        empty groups are left out.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Invalid model: {type(model).__name__} (model must be a torch.nn.Module, whose names and layers make "
            "the groups; AMAdamW and AMSGD take parameters)"
        )
    if not isinstance(decay_embeddings, bool):
        raise TypeError(f"Invalid decay_embeddings: {decay_embeddings!r} (decay_embeddings must be True or False)")
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trainable:
        raise ValueError(f"Invalid model: {type(model).__name__} has no parameter that requires a gradient")
    kept = _without_decay(model, decay_embeddings)
    patterns = _compile(overrides or {}, [strip_wrappers(name) for name, _ in trainable])
    groups: dict[Any, dict[str, Any]] = {}
    for name, param in trainable:
        decay = 0.0 if id(param) in kept else weight_decay
        options: dict[str, Any] = {"weight_decay": decay}
        matching = tuple(i for i, (pattern, _) in enumerate(patterns) if pattern.search(strip_wrappers(name)))
        for i in matching:
            options.update(patterns[i][1])
        key = (matching, id(param) in kept)
        groups.setdefault(key, {"params": [], **options})["params"].append((strip_wrappers(name), param))
    return [groups[key] for key in sorted(groups)]


def _without_decay(model: nn.Module, decay_embeddings: bool) -> set[int]:
    """ids of parameters that get no weight decay: by module type, by name, and by their logical shape."""
    trainer = getattr(model, "_trainer", None)  # a LightningModule: the outermost FSDP module is around it
    ndims = logical_ndims(getattr(trainer, "model", None) or model)
    result: set[int] = set()
    for module in model.modules():
        norm = isinstance(module, _NORMS) or "norm" in type(module).__name__.lower()
        embedding = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for name, param in module.named_parameters(recurse=False):
            bias = name == "bias" or name.endswith("_bias") or bool(re.match(r"bias_[ih]h", name))
            thin = ndims.get(id(param), param.ndim) <= 1
            if norm or bias or thin or (embedding and not decay_embeddings):
                result.add(id(param))
    return result


def _checked(overrides: Overrides | None, options: tuple[str, ...]) -> Overrides:
    """Overrides whose shape and option names are right; the optimizer checks the values."""
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise TypeError(f"Invalid overrides: {overrides!r} (overrides must be {{pattern: {{option: value}}}})")
    for pattern, chosen in overrides.items():
        if not isinstance(pattern, str) or not isinstance(chosen, Mapping):
            raise TypeError(f"Invalid overrides: {{{pattern!r}: {chosen!r}}} (must be {{pattern: {{option: value}}}})")
        for option in chosen:
            if option not in options:
                raise ValueError(
                    f"Invalid overrides[{pattern!r}]: unknown option {option!r} (allowed: {', '.join(options)})"
                )
    return overrides


def _compile(overrides: Overrides, names: list[str]) -> list[tuple[re.Pattern[str], Mapping[str, Any]]]:
    """The patterns, each of which must match a name."""
    compiled = []
    for pattern, chosen in overrides.items():
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"Invalid overrides: {pattern!r} is not a regular expression: {error}") from error
        if not any(expression.search(name) for name in names):
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise ValueError(f"Invalid overrides: pattern {pattern!r} matches no parameter (names are: {shown})")
        compiled.append((expression, chosen))
    return compiled
