"""Seconds and memory of steps. All contenders step in turn, so that other load of the machine affects each equally."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from am_lightning.bench.contenders import Contender
from am_lightning.bench.models import wait_for

Pairs = list[tuple[Tensor, Tensor]]
WARM_UP = 2  # untimed rounds after the first step


@dataclass(eq=False)
class Measured:
    """The measurements of one contender.

    Attributes:
        contender: contender that was measured.
        first: seconds of its first step, which builds kernels and creates the state.
        extra_bytes: peak memory of one step beyond what is allocated before it, or None if it is unknown.
        seconds: seconds of the timed step of each round.
    """

    contender: Contender
    first: float
    extra_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)

    def ratio_to(self, other: Measured) -> float:
        """Return the median over the rounds of this time divided by the other one in the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def measure(
    contenders: Sequence[Contender],
    repeats: int,
    device: torch.device,
    *,
    cpu_time: bool = False,
    passes: Callable[[], None] | None = None,
) -> tuple[list[Measured], dict[str, str]]:
    """Return the measurements of each contender, and the reason for each name that could not step.

    Args:
        contenders: optimizers on the same parameters.
        repeats: timed rounds.
        device: device of the parameters.
        cpu_time: whether to count the CPU seconds of all threads of this process instead of the elapsed time.
        passes: forward and backward pass that runs before each timed step, or None.
    """
    clock = time.process_time if cpu_time else time.perf_counter
    moments: dict[Tensor, dict[str, Tensor]] = {}
    kept = _gradients(contenders)
    seen, missing = [], {}
    for contender in contenders:
        try:
            seen.append(Measured(contender, _seconds(contender, device, time.perf_counter, kept)))
        except RuntimeError as error:
            missing[contender.name] = str(error)
            contender.optimizer.state.clear()  # the step that ran out of memory has left a state
            _restore(contender, kept)
            continue
        contender.share_moments(moments)  # memory for one optimizer, not for ten
    for _ in range(WARM_UP):
        for each in seen:
            _seconds(each.contender, device, clock, kept)
    for each in seen:
        each.extra_bytes = _extra_bytes(each.contender, device)
        _restore(each.contender, kept)
    for _ in range(repeats):
        for each in seen:
            if passes is not None:
                passes()
            each.seconds.append(_seconds(each.contender, device, clock, kept))
    return seen, missing


def _seconds(contender: Contender, device: torch.device, clock: Callable[[], float], gradients: Pairs) -> float:
    start = clock()
    contender.step()
    wait_for(device)
    seconds = clock() - start
    _restore(contender, gradients)
    return seconds


def _gradients(contenders: Sequence[Contender]) -> Pairs:
    """Return the gradients that a contender overwrites, with copies, so that all steps have the same gradients."""
    groups = (group for each in contenders if each.overwrites for group in each.optimizer.param_groups)
    params = dict.fromkeys(param for group in groups for param in group["params"])
    return [(param.grad, param.grad.clone()) for param in params]


def _restore(contender: Contender, gradients: Pairs) -> None:
    if contender.overwrites:
        for gradient, copy in gradients:
            gradient.copy_(copy)


def _extra_bytes(contender: Contender, device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        contender.step()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that earlier steps have freed must not hide what this one takes
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark
        before = _status("VmRSS")
        contender.step()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):  # not Linux, not glibc
        return None


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(key)).split()[1]) * 1024
