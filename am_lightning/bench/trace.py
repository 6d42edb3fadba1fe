"""Functions that an ordinary step enters: ``python -m am_lightning.bench.trace [--optimizer NAME] [--lines]``.

The sixth step is traced. Functions of this package (``--optimizer AdamW``: of torch.optim) are counted once each,
without comprehensions. "changes" is how often the step passes from one file to another.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

import am_lightning

_WARM_UP = 5
_OPTIMIZERS: dict[str, Any] = {
    "AMAdamW": am_lightning.AMAdamW,
    "AMSGD": am_lightning.AMSGD,
    "AdamW": torch.optim.AdamW,
}


class Call(NamedTuple):
    """A call of a function: its depth in the step, its file relative to the package, and its name."""

    depth: int
    file: str
    name: str


def trace(run: Callable[[], Any], folder: Path) -> list[Call]:
    """Return the calls of functions in ``folder``, in their order."""
    calls: list[Call] = []
    depth = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth
        path, code = Path(frame.f_code.co_filename), frame.f_code
        if event not in ("call", "return") or folder not in path.parents or code.co_name.startswith("<"):
            return
        if event == "call":
            name = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has only co_name
            calls.append(Call(depth, str(path.relative_to(folder)), name))
        depth += 1 if event == "call" else -1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def an_ordinary_step(name: str) -> tuple[Callable[[], Any], Path]:
    """Return a step of an optimizer on a small model after five others, and the folder of its code."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))
    optimizer = _OPTIMIZERS[name](model.named_parameters(), lr=1e-3)
    data = torch.randn(32, 8, device=next(model.parameters()).device)

    def backward() -> None:
        optimizer.zero_grad()
        model(data).square().mean().backward()

    for _ in range(_WARM_UP):
        backward()
        optimizer.step()
    backward()
    module = torch.optim if name == "AdamW" else am_lightning
    return optimizer.step, Path(str(module.__file__)).parent


def main(args: Sequence[str] | None = None) -> None:
    """Print the functions of a step and their number."""
    parser = argparse.ArgumentParser(prog="python -m am_lightning.bench.trace", description=__doc__)
    parser.add_argument("--optimizer", choices=[*_OPTIMIZERS], default="AMAdamW")
    parser.add_argument("--lines", action="store_true", help="print each call, indented by its depth")
    options = parser.parse_args(args)
    calls = trace(*an_ordinary_step(options.optimizer))
    if options.lines:
        for call in calls:
            print(f"{'  ' * call.depth}{call.name}  ({call.file})")
    files = [call.file for call in calls]
    changes = sum(a != b for a, b in itertools.pairwise(files))
    functions = {(call.file, call.name) for call in calls}
    print(
        f"{options.optimizer}: {len(set(files))} files, {len(functions)} functions, {changes} changes of file, "
        f"{len(calls)} calls"
    )


if __name__ == "__main__":
    main()
