"""Which kernels ``fused=True`` means on a device, what they need, and where ``fused=None`` means them, too."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from am_lightning.optim.kernels.cpu.build import find_compiler, load_library
from am_lightning.optim.kernels.transfer import is_capturing, is_fake
from am_lightning.optim.kernels.triton.check import Kind, require_launch, why_not
from am_lightning.optim.kernels.triton.launch import require_triton

TRITON, LOOP, COMPILED = "Triton", "C++ loop", "torch.compile"
TRITON_DEVICES = {"cuda"}  # ROCm's name too
COMPILED_DEVICES = {"xpu", "mps", "mtia"}  # Inductor serves them
SWITCH = "AM_LIGHTNING_FUSED"  # environment: "cpp" or "compile" on the CPU


def fused_tier(device: torch.device) -> str:
    """The kernels of ``fused=True`` on a device.

    Raises:
        RuntimeError: what they need is not installed; the text says what to install.
    """
    if device.type in TRITON_DEVICES:
        _require_gpu(device)
        return TRITON
    if device.type == "cpu":
        return _on_cpu(os.environ.get(SWITCH))
    _check_device(device)
    return COMPILED


def agreed_on_cpu(summed: Callable[[Tensor], Tensor]) -> str:
    """Collective. The kernels of ``fused=True`` on the CPU, the same on every rank, so that copies stay equal.

    Args:
        summed: the sum of a vector over the ranks.

    Raises:
        RuntimeError: some rank has nothing to build with, or a bad $CXX or AM_LIGHTNING_FUSED; on every rank alike.

    Warns:
        UserWarning: the ranks' loops were built by other compilers, or for other CPUs.
    """
    mine, reason = None, ""
    try:
        mine = fused_tier(torch.device("cpu"))
    except Exception as error:  # whatever it is, the other ranks are waiting for this one's vote
        reason = str(error)
    build = load_library().build if mine == LOOP else 0
    votes = [mine == LOOP, mine == COMPILED, mine is None, build, build * build]
    loops, compiled, none, total, squares = (int(n) for n in summed(_on_host(votes)).tolist())
    if none:
        raise RuntimeError(reason or str(_no_compiler(f"{none} of the other ranks cannot build")))
    assert mine is not None
    if loops and compiled:
        return COMPILED
    if loops * squares != total * total:  # equal where all builds are, and nowhere else (Cauchy and Schwarz)
        warnings.warn(
            "fused=True: the ranks' C++ loops were built by different compilers or for different CPUs, so that copies "
            "of a parameter may come to differ in their last bits; AM_LIGHTNING_FUSED=compile or fused=None avoid it",
            stacklevel=2,
        )
    return mine


def require_fused(device: torch.device) -> None:
    """Raise where ``fused=True`` cannot work on a device. On a GPU a small step is made, elsewhere nothing is built.

    Raises:
        RuntimeError: the text says what to install.
    """
    if is_fake():
        return
    if device.type in TRITON_DEVICES:
        _require_gpu(device)
    elif device.type == "cpu":
        _check_switch(os.environ.get(SWITCH))
        if find_compiler() is None and not _inductor_has_compiler():
            raise _no_compiler("$CXX, c++, g++ and clang++ cannot be run")
    elif device.type != "meta":  # where a model waits for its real device: step() will see that one
        _check_device(device)


def _require_gpu(device: torch.device) -> None:
    if is_capturing(device):  # nothing may be built or waited for; the tables refuse what has not stepped before
        require_triton()
    else:
        require_launch(Kind(device))


class OnGPU(NamedTuple):
    """What the ranks have agreed on.

    Attributes:
        fused: ``fused=True`` stays on.
        why_not: the reason why ``fused=None`` is not Triton; "" where it is.
    """

    fused: bool
    why_not: str


def agree_on_gpu(
    summed: Callable[[Tensor], Tensor] | None, asked: Iterable[Kind], default: Iterable[Kind], dropped: bool
) -> OnGPU:
    """Collective. The kernels for parameters on GPUs, the same on every rank, so that copies stay equal.

    Args:
        summed: the sum of a vector over the ranks; None: there is one.
        asked: kinds of this rank's parameters with ``fused=True``.
        default: kinds of those with ``fused=None``, ``foreach=None``: they go to Triton where it works on every rank.
        dropped: this rank has fallen back from ``fused=True`` (``convert_adamw``): all are to do so.

    Raises:
        RuntimeError: Triton does not work on some rank that asks for it; on every rank alike.
    """
    missing, reason = (next(filter(None, map(_why_not, sorted(kinds, key=str))), "") for kinds in (asked, default))
    votes = [int(bool(missing)), int(bool(reason)), int(dropped)]
    if summed is not None:
        votes = [int(n) for n in summed(_on_host(votes)).tolist()]
    failed, without, fallen = votes
    if failed:
        others = f"it does not work on {failed} of the other ranks (their own errors say why): install it on all nodes"
        raise RuntimeError(f"fused=True on a GPU needs Triton kernels, but {missing or others}, or use fused=None")
    return OnGPU(not fallen, reason or (f"it does not work on {without} of the other ranks" if without else ""))


def _on_host(votes: list[int]) -> Tensor:
    return torch.tensor(votes, dtype=torch.float64, device="cpu")


def _why_not(kind: Kind) -> str:
    try:
        return why_not(kind)
    except Exception as error:  # whatever it is, the other ranks are waiting for this one's vote
        return str(error) or type(error).__name__


def _check_device(device: torch.device) -> None:
    if device.type not in COMPILED_DEVICES:
        names = sorted({"cpu", *TRITON_DEVICES, *COMPILED_DEVICES})
        raise RuntimeError(
            f"fused=True has no kernels for parameters on {device.type!r} (but for {', '.join(names)}): use fused=None"
        )


def words_of(tier: str) -> str:
    """A tier's name, with what is known of how it was built."""
    return load_library().words if tier == LOOP else tier


@functools.cache
def _on_cpu(switch: str | None) -> str:
    """The C++ loop where a compiler is: it was faster at every size that was measured (docs/performance.md)."""
    _check_switch(switch)
    reason = "$CXX, c++, g++ and clang++ cannot be run"
    if switch != "compile" and find_compiler() is not None:
        try:
            load_library()
            return LOOP
        except RuntimeError as error:
            if switch == "cpp":
                raise
            reason = str(error)
            warnings.warn(f"fused=True goes through torch.compile: {reason}", stacklevel=2)
    if switch == "cpp" or not _inductor_has_compiler():
        raise _no_compiler(reason)
    return COMPILED


def _check_switch(switch: str | None) -> None:
    if switch not in (None, "", "cpp", "compile"):
        raise ValueError(f"Invalid {SWITCH}: {switch!r} ({SWITCH} must be 'cpp' | 'compile', or unset)")


def _no_compiler(reason: str) -> RuntimeError:
    return RuntimeError(
        f"fused=True on the CPU needs a C++ compiler, but {reason}. Install one (Debian, Ubuntu: apt-get install g++; "
        "conda: conda install cxx-compiler; macOS: xcode-select --install; Windows: Build Tools for Visual Studio), "
        "set CXX to one that is elsewhere, or use fused=None"
    )


@functools.cache
def _inductor_has_compiler() -> bool:
    """Whether torch.compile can build for the CPU."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception:  # torch's private module may raise, or have moved
        return False
    return True
