"""What kernels keep from step to step: buffers and tables, nothing that a checkpoint needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from am_lightning.optim.kernels.inputs import GradientClip
from am_lightning.optim.kernels.transfer import Constants

_T = TypeVar("_T")


class Workspace:
    """Shared by all plans of an optimizer.

    Attributes:
        constants: vectors that stay on a device.
        gradient_clip: of the next step; None: it does not clip.
        gradient_factor: 0-dim, what the step that runs multiplies its gradients by; None: nothing.
        why_no_fused: the reason why ``fused=None`` is not a device's fused kernel, "" where it is or none was asked.
        captured: what CUDA graphs read.
        fused_by_default: device types whose fused kernel serves ``fused=None``, as all ranks have agreed.
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
        """What ``make``, a class or a function, has made once for all plans."""
        if make not in self._kept:
            self._kept[make] = make()
        return self._kept[make]  # type: ignore[no-any-return]
