"""The fixtures: zip files with a checkpoint, and with the state and next steps of the code that wrote it."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.checkpoints.net import END, STOP

FOLDER = Path(__file__).parent / "saved"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}  # for later steps: another CPU sums in another order
UNIT = 2.0**-7  # rounding to bfloat16 may give an element one unit more or less
Betas = list[dict[str, float]]  # per step, by name


class Run(Protocol):
    """A model and its optimizer, in one process or in a rank of several. ``load`` is called on a new one."""

    cap: float

    def train(self, steps: range) -> Betas: ...
    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...
    def weights(self) -> dict[str, Tensor]: ...
    def optimizer_state(self) -> dict[str, Any]: ...


# ---------------------------------------------------------------- written
def write(run: Run, folder: Path, rank: int = 0) -> None:
    """Train, save into ``folder/checkpoint``, continue, and keep the state and the result."""
    before = run.train(range(STOP))
    run.save(folder / "checkpoint")
    loaded = loaded_of(run)
    keep(folder, rank, loaded, before, run.train(range(STOP, END)), run)


def keep(folder: Path, rank: int, loaded: dict[str, Any], before: Betas, after: Betas, run: Run) -> None:
    """Write ``folder/expectedRANK.pt``; before and after the checkpoint many betas must lie between the clamps."""
    if before:  # torch's AdamW has none
        assert_not_vacuous(before[1:], run.cap)
    assert_not_vacuous(after, run.cap)
    weights = {name: weight.clone() for name, weight in run.weights().items()}
    expected = {"loaded": loaded, "momentum": after, "weights": weights, "torch": str(torch.__version__)}
    torch.save(expected, folder / f"expected{rank}.pt")


def loaded_of(run: Run) -> dict[str, Any]:
    """Return copies of all that a checkpoint restores, without betas[0], which is the live optimizer's cap."""
    tree = {"weights": run.weights(), "optimizer": run.optimizer_state()}
    return {path: _plain(leaf) for path, leaf in _leaves(tree) if not path.endswith("/betas/0")}


def assert_not_vacuous(seen: Betas, cap: float, share: float = 0.3) -> None:
    """Require many betas between the clamps, because a clipped beta hides a wrong one."""
    betas = [beta for step in seen for beta in step.values()]
    inside = sum(1e-3 < beta < cap - 1e-3 for beta in betas) / len(betas)
    assert inside >= share, f"only {inside:.0%} of the betas lie between 0 and the cap"


def pack(folder: Path, name: str) -> Path:
    """Write ``saved/NAME.zip`` of everything in ``folder``, except the programs that DeepSpeed puts there."""
    FOLDER.mkdir(exist_ok=True)
    with zipfile.ZipFile(FOLDER / f"{name}.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix != ".py":
                info = zipfile.ZipInfo(path.relative_to(folder).as_posix())
                archive.writestr(info, path.read_bytes(), zipfile.ZIP_DEFLATED, 9)
    return FOLDER / f"{name}.zip"


# ---------------------------------------------------------------- read
def unpack(name: str, folder: Path) -> Path:
    with zipfile.ZipFile(FOLDER / f"{name}.zip") as archive:
        archive.extractall(folder)
    return folder


def expected_of(folder: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"expected{rank}.pt", weights_only=True)
    return found


def differences(run: Run, folder: Path, rank: int = 0, *, rounded: bool = False) -> list[str]:
    """Load ``folder/checkpoint`` into a new run and continue; return what differs.

    Args:
        rounded: whether numbers are rounded to bfloat16 after each step; see :data:`UNIT`.
    """
    expected = expected_of(folder, rank)
    run.load(folder / "checkpoint")
    found = differences_of_loaded(loaded_of(run), expected["loaded"])
    return found + differences_of_steps(run.train(range(STOP, END)), run.weights(), expected, rounded=rounded)


def differences_of_loaded(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Compare bitwise. A later version's groups may have more options, but its states no more tensors."""
    wrong = [
        f"{path} was {value!r}, is {found.get(path)!r}"
        for path, value in expected.items()
        if path not in found or not _same(found[path], value)
    ]
    return wrong + [f"{path} is new" for path in found.keys() - expected.keys() if "/state/" in path]


def differences_of_steps(
    seen: Betas, weights: dict[str, Tensor], expected: dict[str, Any], *, rounded: bool = False
) -> list[str]:
    names = [list(step) for step in expected["momentum"]]
    if [list(step) for step in seen] != names:
        return [f"momentum() names {[list(step) for step in seen]}, not {names}"]
    tight = min(TOLERANCE.get(weight.dtype, 1e-6) for weight in weights.values())
    loose = UNIT if rounded else tight  # one element of a few decides a beta
    wrong = []
    for step, (ours, theirs) in enumerate(zip(seen, expected["momentum"], strict=True), start=STOP):
        wrong += [
            f"step {step}: beta of {n} was {b}, is {ours[n]}"
            for n, b in theirs.items()
            if not abs(ours[n] - b) <= loose
        ]
    for name, was in expected["weights"].items():
        error = (weights[name].double() - was.double()).abs() / was.double().abs().clamp(min=1)
        many = int((error > tight).sum()) > (1 if rounded else 0)
        if many or not bool((error <= (UNIT if rounded else tight)).all()):
            wrong.append(f"{name} is off by {float(error.max()):.1e} after {len(seen)} steps")
    return wrong


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}/{key}")
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{path}/{index}")
    else:
        yield path, tree


def _plain(leaf: Any) -> Any:
    """Return a copy; of a DTensor this rank's shard."""
    if not isinstance(leaf, Tensor):
        return leaf
    return (leaf.to_local() if isinstance(leaf, DTensor) else leaf).detach().clone()


def _same(found: Any, expected: Any) -> bool:
    if not isinstance(expected, Tensor):
        nan = isinstance(expected, float) and math.isnan(expected)
        return bool(found == expected or (nan and math.isnan(found)))
    same = isinstance(found, Tensor) and found.dtype == expected.dtype and found.shape == expected.shape
    return same and torch.equal(_bits(found), _bits(expected))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)
