"""Seconds and memory of steps: all contenders in turn in one process, so that a busy machine is as busy for each."""

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
    """What was seen of one contender.

    Attributes:
        first: seconds of its first step, which builds what it needs and makes its state.
        extra_bytes: most that one step takes beyond what is there before it; None where that cannot be known.
        seconds: of each timed step, one a round.
    """

    contender: Contender
    first: float
    extra_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    def ratio_to(self, other: Measured) -> float:
        """Median over the rounds of this one's time by the other's in the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def measure(
    contenders: Sequence[Contender], repeats: int, device: torch.device, *, cpu_time: bool = False
) -> tuple[list[Measured], dict[str, str]]:
    """Everything of each contender, and why some could not step: name -> reason.

    Args:
        cpu_time: count the seconds that this process computes, in all its threads, and not those that it waits.
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
            contender.optimizer.state.clear()  # of a step that ran out of memory midway
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
    """With copies, for those that overwrite them: all are to step on the same ones in every round."""
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
        ctypes.CDLL(None).malloc_trim(0)  # what earlier steps gave back must not hide what this one takes
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts anew
        before = _status("VmRSS")
        contender.step()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):  # not Linux, not glibc
        return None


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(key)).split()[1]) * 1024
