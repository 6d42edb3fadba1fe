"""The optimizers that are compared, on the same parameters, gradients and moments."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from am_lightning.bench.models import READ, Shape
from am_lightning.optim import AMAdamW
from am_lightning.optim.kernels.registry import CPP, fused_kernel

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(eq=False)
class Contender:
    """An optimizer in one of its forms.

    Attributes:
        name: name in the table.
        same: name of the AdamW of the same form.
        optimizer: the optimizer.
        bytes_moved: bytes of one step by the word model, or None if they are unknown.
        made: seconds of creating the optimizer, or None if they were not measured.
        shares: whether its moments are those of AdamW, so that all optimizers can use one pair.
        overwrites: whether a step changes the gradients.
    """

    name: str
    same: str
    optimizer: torch.optim.Optimizer
    bytes_moved: int | None
    made: float | None = None
    shares: bool = True
    overwrites: bool = False

    @classmethod
    def timed(
        cls, name: str, same: str, make: Callable[[], torch.optim.Optimizer], bytes_moved: int | None
    ) -> Contender:
        """Create the optimizer with ``make``, and measure the time."""
        start = time.perf_counter()
        optimizer = make()
        return cls(name, same, optimizer, bytes_moved, time.perf_counter() - start)

    def step(self) -> None:
        """Take an optimizer step."""
        self.optimizer.step()

    def share_moments(self, moments: dict[Tensor, dict[str, Tensor]]) -> None:
        """Share the first contender's moments, if this one's have the same dtype."""
        if not self.shares:
            return
        for param, state in self.optimizer.state.items():
            known = moments.setdefault(param, {})
            for key in MOMENTS:
                if key in state and known.setdefault(key, state[key]).dtype == state[key].dtype:
                    state[key] = known[key]

    def kernels(self) -> str:
        """Return a description of the kernels of a step."""
        if isinstance(self.optimizer, ReadOnce):
            return "torch.dot"
        if not isinstance(self.optimizer, AMAdamW):
            package = type(self.optimizer).__module__.partition(".")[0]
            return "torch.optim" if package == "torch" else package
        return self.optimizer.describe().rpartition("kernels: ")[2]


class ReadOnce(torch.optim.Optimizer):
    """Reads what a first pass must read, by dot products, and changes nothing. No kernel can take less time."""

    def __init__(self, params: list[torch.nn.Parameter], *, decays: bool) -> None:
        super().__init__(params, {})
        self._decays = decays

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Compute d . v, and g . p with weight decay or g . g without."""
        for group in self.param_groups:
            for param in group["params"]:
                state, grad = self.state[param], param.grad.view(-1)
                if not state:
                    state.update({key: torch.zeros_like(param) for key in MOMENTS})
                first, second = (state[key].view(-1) for key in MOMENTS)
                torch.dot(first, second)
                torch.dot(grad, param.view(-1) if self._decays else grad)


def make_parameters(shapes: list[Shape], dtype: torch.dtype, device: torch.device) -> list[torch.nn.Parameter]:
    """Return normal weights with gradients."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        values = torch.randn((2, *shape), generator=generator, device=device, dtype=torch.float32)
        param = torch.nn.Parameter((values[0] * 0.05).to(dtype))
        param.grad = (values[1] * 1e-3).to(dtype)
        params.append(param)
    return params


def import_all() -> None:
    """Create an optimizer, so that torch's imports at the first one count for none of those that are timed."""
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1, device="cpu"))])


def bytes_of_adamw(elements: int, size: int) -> int:
    """Return the bytes of AdamW, which reads p g m v and writes p m v."""
    return 7 * size * elements


def bytes_of_amadamw(elements: int, size: int, *, decays: bool, direction: int) -> int:
    """Return the bytes of AMAdamW. Pass 1 reads g d v, and p with weight decay; pass 2 reads p g d v, writes p d v."""
    words = 2 + 3 + 2 + decays  # for g, v and p
    return (words * size + 3 * direction) * elements


def bytes_of_first_pass(elements: int, size: int, *, decays: bool) -> int:
    """Return the bytes of a first pass, which reads g d v, and p with weight decay."""
    return (3 + decays) * size * elements


def make_contenders(
    params: list[torch.nn.Parameter], *, decay: float, scope: str, device: torch.device
) -> tuple[list[Contender], dict[str, str]]:
    """Return all that run on the device, and the reason for each name that does not."""
    elements, size = sum(p.numel() for p in params), params[0].element_size()
    options: dict[str, Any] = {"lr": 1e-6, "weight_decay": decay}
    import_all()
    wanted: list[tuple[str, str, Callable[[], torch.optim.Optimizer], int]] = []
    for kind, how in ADAMW.items():
        make = partial(torch.optim.AdamW, params, **options, **how)
        wanted.append((f"AdamW {kind}", f"AdamW {kind}", make, bytes_of_adamw(elements, size)))
    reads = bytes_of_first_pass(elements, size, decays=decay > 0)
    wanted.append((READ, "AdamW fused", partial(ReadOnce, params, decays=decay > 0), reads))
    for kind, (same, how) in _kinds(device, params[0].dtype).items():
        direction = 2 if "exp_avg_dtype" in how else size
        moved = bytes_of_amadamw(elements, size, decays=decay > 0, direction=direction)
        ours = partial(AMAdamW, params, **options, scope=scope, **how)
        wanted.append((f"AMAdamW {kind}", f"AdamW {same}", ours, moved))
    result, missing = [], {}
    for each in wanted:
        try:
            result.append(Contender.timed(*each))
        except RuntimeError as error:
            missing[each[0]] = str(error)
    return result, missing


ADAMW: dict[str, dict[str, Any]] = {
    "default": {},
    "single": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def _kinds(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the options of each form of AMAdamW, and the form of AdamW that it is compared with."""
    kinds: dict[str, tuple[str, dict[str, Any]]] = {"single_tensor": ("single", {"foreach": False})}
    kinds["default"] = ("default", {})
    if device.type == "cpu":
        kinds["chunked"] = ("foreach", {"fused": False})
    kinds["foreach"] = ("foreach", {"foreach": True})
    kernel = fused_kernel(device)
    if kernel is not None:
        kinds[f"fused, {'C++ loop' if kernel is CPP else kernel.name}"] = ("fused", {"fused": True})
    if dtype == torch.float32:
        kinds["fused, bfloat16 exp_avg"] = ("fused", {"fused": True, "exp_avg_dtype": torch.bfloat16})
    return kinds
