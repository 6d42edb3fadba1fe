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
    """Create an AMAdamW for a module. Norms, biases and 1-D parameters get no weight decay, and parameters have names.

    Args:
        model: the module. Parameters that do not require a gradient are left out.
        lr: learning rate of all groups (default: 1e-3).
        weight_decay: decoupled weight decay of all parameters except norms, biases and 1-D parameters
            (default: 1e-2).
        decay_embeddings: whether weight decay applies to the weights of embeddings (default: True).
        overrides: ``{pattern: {option: value}}``, options of the parameters whose name contains a match of the regular
            expression ``pattern`` (default: None). If several patterns match, the options of all of them apply, and
            later ones win. Example: ``{r"lm_head": {"lr": 1e-4}}``.
        **options: keyword arguments of ``AMAdamW``.

    Raises:
        ValueError: if ``model`` has no parameter to train; if a pattern matches no parameter or is not a regular
            expression; if an option is unknown; or if the shapes of parameters are not known, because an FSDP1 module
            around ``model`` holds them or because they are flat.
        TypeError: if ``model`` is not a module or ``overrides`` is not a mapping of mappings.
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
    """Create an AMSGD for a module.

    Args:
        model, lr, decay_embeddings, overrides: see ``am_adamw``.
        weight_decay: weight decay of all parameters except norms, biases and 1-D parameters (default: 0).
        **options: keyword arguments of ``AMSGD``.

    Raises:
        ValueError, TypeError: if an argument is out of range or of the wrong type, or if a pattern of ``overrides``
            matches no parameter.
    """
    groups = parameter_groups(
        model, weight_decay, decay_embeddings=decay_embeddings, overrides=_checked(overrides, _SGD_OPTIONS)
    )
    return AMSGD(groups, lr=lr, weight_decay=weight_decay, **options)


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_embeddings: bool = True, overrides: Overrides | None = None
) -> list[dict[str, Any]]:
    """Return parameter groups with named parameters for any torch optimizer.

    The group with weight decay comes first, then the group without, then the groups of parameters with overrides.

    Args:
        model: the module. Parameters that do not require a gradient are left out.
        weight_decay: weight decay of the first group.
        decay_embeddings, overrides: see ``am_adamw``.

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
    """Return the ids of parameters without weight decay, found by module type, name and logical shape."""
    trainer = getattr(model, "_trainer", None)  # the trainer of a LightningModule holds the FSDP module around it
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
    """Check the form and the option names of ``overrides``. The optimizer checks the values."""
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
    """Compile the patterns, each of which must match at least one of ``names``."""
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
