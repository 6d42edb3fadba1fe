"""Detect on a CPU what makes the host wait if tensors are on a GPU."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

# A value goes to the host, or the size of the result depends on one. bool() and float() come here.
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "unique2", "_unique2")
READS += ("bincount", "unique_consecutive", "unique_dim")
MASKED = ("index", "index_put", "index_put_", "_index_put_impl_")  # with boolean indices they call nonzero
COPIES = ("cpu", "numpy", "tolist")
UPLOADS = ("new_tensor", "tensor", "as_tensor")  # pageable memory is read before they return
MAKERS = ("tensor", "as_tensor", "from_numpy", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint")

HOST_ONLY = ("torch/utils/data/", "am_lightning/pretrain/data/")  # rows before they are moved
MOVES = "lightning/fabric/utilities/apply_func.py"  # a batch: blocking for the CPU alone


class Waits:
    """Record (steps done, what, where) while entered, but not within an optimizer's step, which tests/optim check.

    Attributes:
        seen: all records.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, str]] = []
        self._steps = 0
        self._stepping = False

    def __enter__(self) -> Waits:
        self._stack = ExitStack()
        for hook in (
            register_optimizer_step_pre_hook(lambda *step: self._step(begins=True)),
            register_optimizer_step_post_hook(lambda *step: self._step(begins=False)),
        ):
            self._stack.callback(hook.remove)
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Operations(self))
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def after(self, *steps: int) -> list[str]:
        """Return what was recorded between the end of one of these steps and the end of the next."""
        return [f"after step {step}: {what} in {where}" for step, what, where in self.seen if step in steps]

    def note(self, what: str) -> None:
        where = _caller()
        if not self._stepping and not any(part in where for part in HOST_ONLY):
            self.seen.append((self._steps, what, where))

    def _step(self, *, begins: bool) -> None:
        self._stepping = begins
        self._steps += not begins


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in MASKED and any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])
        if name in READS or masked:
            self.waits.note(name)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Also record copies of tensors that would be on the host: a loader's, and those made without a device."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits
        self.host: Any = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        placed = kwargs.get("device") is not None
        waits = name in COPIES or name == "new_tensor" or (name in UPLOADS and placed)
        if name in ("to", "copy_"):
            waits = self._is_copied_to_the_device(name, args, kwargs) and not self._moves(kwargs)
        if waits:
            self.waits.note(name)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            if (name in MAKERS and not placed) or any(part in _caller() for part in HOST_ONLY):
                self.host[result] = True
            elif name == "to":  # on a GPU the result would be another tensor
                self.host.pop(result, None)
        return result

    def _is_copied_to_the_device(self, name: str, args: Any, kwargs: Any) -> bool:
        if name == "copy_":
            return args[1] in self.host and args[0] not in self.host
        to_a_device = any(isinstance(place, str | torch.device) for place in (*args[1:2], kwargs.get("device")))
        return args[0] in self.host and to_a_device

    def _moves(self, kwargs: Any) -> bool:
        return bool(kwargs.get("non_blocking", False)) or MOVES in _caller()


def _caller() -> str:
    """Return the innermost frame outside the detector and torch; a loader's frame if it is in one."""
    frame, first = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if any(part in name for part in HOST_ONLY):
            return name
        if not first and name != __file__ and "/torch/" not in name:
            first = f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return first
