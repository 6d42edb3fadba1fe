"""The optimizers to compare, on the same parameters, gradients and moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from am_lightning.bench.models import Shape
from am_lightning.optim import AMAdamW
from am_lightning.optim.kernels.registry import CPP, fused_kernel

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(eq=False)
class Contender:
    """One way to step.

    Attributes:
        name: as in the table.
        same: the AdamW of the same kind, by name.
        optimizer: made with it.
        bytes_moved: of one step, as the word model counts them.
    """

    name: str
    same: str
    optimizer: torch.optim.Optimizer
    bytes_moved: int

    def step(self) -> None:
        """One optimizer step."""
        self.optimizer.step()

    def share_moments(self, moments: dict[Tensor, dict[str, Tensor]]) -> None:
        """Take the moments that others have already, where they are of its dtype; give its own where none have."""
        for param, state in self.optimizer.state.items():
            known = moments.setdefault(param, {})
            for key in MOMENTS:
                if key in state and known.setdefault(key, state[key]).dtype == state[key].dtype:
                    state[key] = known[key]

    def kernels(self) -> str:
        """What a step ran, in words."""
        if isinstance(self.optimizer, ReadOnce):
            return "torch.dot"
        if not isinstance(self.optimizer, AMAdamW):
            return "torch.optim"
        return self.optimizer.describe().rpartition("kernels: ")[2]


class ReadOnce(torch.optim.Optimizer):
    """Changes nothing: reads what a first pass must read, by dot products. What that takes, no kernel can save."""

    def __init__(self, params: list[torch.nn.Parameter], *, decays: bool) -> None:
        super().__init__(params, {})
        self._decays = decays

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """d . v, and g . p with weight decay, else g . g."""
        for group in self.param_groups:
            for param in group["params"]:
                state, grad = self.state[param], param.grad.view(-1)
                if not state:
                    state.update({key: torch.zeros_like(param) for key in MOMENTS})
                first, second = (state[key].view(-1) for key in MOMENTS)
                torch.dot(first, second)
                torch.dot(grad, param.view(-1) if self._decays else grad)


def make_parameters(shapes: list[Shape], dtype: torch.dtype, device: torch.device) -> list[torch.nn.Parameter]:
    """Normal weights, each with a gradient that stays."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        values = torch.randn((2, *shape), generator=generator, device=device, dtype=torch.float32)
        param = torch.nn.Parameter((values[0] * 0.05).to(dtype))
        param.grad = (values[1] * 1e-3).to(dtype)
        params.append(param)
    return params


def bytes_of_adamw(elements: int, size: int) -> int:
    """Read p g m v, write p m v."""
    return 7 * size * elements


def bytes_of_amadamw(elements: int, size: int, *, decays: bool, direction: int) -> int:
    """Pass 1 reads g d v, and p with weight decay; pass 2 reads p g d v and writes p d v."""
    words = 2 + 3 + 2 + decays  # of g, v and p
    return (words * size + 3 * direction) * elements


def bytes_of_first_pass(elements: int, size: int, *, decays: bool) -> int:
    """g d v, and p with weight decay."""
    return (3 + decays) * size * elements


def make_contenders(
    params: list[torch.nn.Parameter], *, decay: float, scope: str, device: torch.device
) -> tuple[list[Contender], dict[str, str]]:
    """All that run on the device, and why others do not: name -> reason."""
    elements, size = sum(p.numel() for p in params), params[0].element_size()
    options: dict[str, Any] = {"lr": 1e-6, "weight_decay": decay}
    result, missing = [], {}
    for kind, how in ADAMW.items():
        try:
            adamw = torch.optim.AdamW(params, **options, **how)
            result.append(Contender(f"AdamW {kind}", f"AdamW {kind}", adamw, bytes_of_adamw(elements, size)))
        except RuntimeError as error:
            missing[f"AdamW {kind}"] = str(error)
    reads = bytes_of_first_pass(elements, size, decays=decay > 0)
    result.append(Contender(READ, "AdamW fused", ReadOnce(params, decays=decay > 0), reads))
    for kind, (same, how) in _kinds(device, params[0].dtype).items():
        try:
            ours = AMAdamW(params, **options, scope=scope, **how)
        except RuntimeError as error:
            missing[f"AMAdamW {kind}"] = str(error)
            continue
        direction = 2 if ours.exp_avg_dtype is not None else size
        moved = bytes_of_amadamw(elements, size, decays=decay > 0, direction=direction)
        result.append(Contender(f"AMAdamW {kind}", f"AdamW {same}", ours, moved))
    return result, missing


def make_others(params: list[torch.nn.Parameter], *, decay: float) -> tuple[list[Contender], dict[str, str]]:
    """What users have today, and the defaults: both AdamWs as they come, RAdam, schedule-free AdamW.

    Returns:
        The contenders, and why others are missing: name -> reason.
    """
    elements, size = sum(p.numel() for p in params), params[0].element_size()
    plain = bytes_of_adamw(elements, size)
    options: dict[str, Any] = {"lr": 1e-6, "weight_decay": decay}
    ours = bytes_of_amadamw(elements, size, decays=decay > 0, direction=size)
    radam = torch.optim.RAdam(params, **options, decoupled_weight_decay=True, foreach=True)
    result = [
        Contender("AdamW default", "AdamW default", torch.optim.AdamW(params, **options), plain),
        Contender("AMAdamW default", "AdamW default", AMAdamW(params, **options), ours),
        Contender("RAdam foreach", "AdamW foreach", radam, plain),
    ]
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError:
        return result, {"schedule-free AdamW": "schedulefree is not installed"}
    free = AdamWScheduleFree(params, **options)
    free.train()
    return [*result, Contender("schedule-free AdamW", "AdamW foreach", free, plain)], {}  # reads p g z v, writes p z v


READ = "(first pass: reads alone)"
ADAMW: dict[str, dict[str, Any]] = {
    "single": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def _kinds(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[str, dict[str, Any]]]:
    """Kind of AMAdamW -> the kind of AdamW it is compared with, its options."""
    kinds: dict[str, tuple[str, dict[str, Any]]] = {"single_tensor": ("single", {"foreach": False})}
    kinds["default"] = ("foreach", {})
    if device.type == "cpu":
        kinds["chunked"] = ("foreach", {"fused": False})
    kinds["foreach"] = ("foreach", {"foreach": True})
    kernel = fused_kernel(device)
    if kernel is not None:
        kinds[f"fused, {'C++ loop' if kernel is CPP else kernel.name}"] = ("fused", {"fused": True})
    if dtype == torch.float32:
        kinds["fused, bfloat16 exp_avg"] = ("fused", {"fused": True, "exp_avg_dtype": torch.bfloat16})
    return kinds
