"""Buffers and tables that kernels keep from step to step. A checkpoint needs none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from am_lightning.optim.kernels.inputs import GradientClip
from am_lightning.optim.kernels.transfer import Constants

_T = TypeVar("_T")


class Workspace:
    """Buffers and settings shared by all plans of an optimizer.

    Attributes:
        constants: vectors that stay on a device.
        gradient_clip: clipping of the next step, or None.
        gradient_factor: 0-dim factor of the gradients in the current step, or None.
        why_no_fused: the reason why no fused kernel serves ``fused=None``, or "".
        captured: objects that CUDA graphs read, kept alive.
        fused_by_default: device types whose fused kernel serves ``fused=None``, agreed by all ranks.
    """

    def __init__(self) -> None:
        self.constants = Constants()
        self.gradient_clip: GradientClip | None = None
        self.gradient_factor: Tensor | None = None
        self.why_no_fused = ""
        self.fused_by_default: set[str] = set()
        self.captured: list[Any] = []
        self._kept: dict[Callable[[], Any], Any] = {}

    def keep(self, make: Callable[[], _T]) -> _T:
        """Return the result of ``make``, a class or a function, which is called once for all plans."""
        if make not in self._kept:
            self._kept[make] = make()
        return self._kept[make]  # type: ignore[no-any-return]
