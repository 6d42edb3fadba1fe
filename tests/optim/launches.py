"""Count the kernels that a CUDA device would launch for the CPU's operators, by torch's rules for ``_foreach_*``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that make a view or uninitialised memory.
FREE = {
    "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "empty_strided", "expand", "lift_fresh",
    "narrow", "new_empty", "new_empty_strided", "permute", "promote_types", "reshape", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
    "_local_scalar_dense", "_record_function_enter_new", "_record_function_exit",
}  # fmt: skip
_TENSORS_OF_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36}  # number of lists -> tensors, depth_to_max_tensors in torch


class Launches(TorchDispatchMode):
    """Count 1 for an operator, and for a list its launches on the multi-tensor route, or 1 per tensor without it."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.by_name: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        count = _of_lists(name, args) if name.startswith("_foreach_") else int(name not in FREE)
        if name == "_to_copy" and result is args[0]:
            count = 0
        self.total += count
        self.by_name[name] = self.by_name.get(name, 0) + count
        return result


def _of_lists(name: str, args: tuple[Any, ...]) -> int:
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and all(isinstance(t, Tensor) for t in arg)]
    if not is_multi_tensor(lists, [arg for arg in args if isinstance(arg, Tensor)]):
        return len(lists[0])
    if name == "_foreach_norm":  # one list, and a launch that adds the chunks' sums
        return -(-len(lists[0]) // _TENSORS_OF_A_LAUNCH[1]) + 1
    depth = len(lists) + (not name.endswith("_"))
    return -(-len(lists[0]) // _TENSORS_OF_A_LAUNCH[depth])


def is_multi_tensor(lists: list[Any], numbers: list[Tensor]) -> bool:
    """Return whether all lists and numbers have one dtype, dense elements, and matching shapes and strides."""
    dtypes = {t.dtype for tensors in lists for t in tensors} | {t.dtype for t in numbers}
    if len(dtypes) != 1 or any(not _is_dense(t) for tensors in lists for t in tensors):
        return False
    return all(
        (a.shape, a.stride()) == (b.shape, b.stride()) for b_s in lists[1:] for a, b in zip(lists[0], b_s, strict=True)
    )


def _is_dense(tensor: Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense.default(tensor))
