"""Every program and engine gives the same loss curve: the laptop recipe, 2 processes, float32, 20 steps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .entry_points import ENTRY_POINTS, Curve, curve_of, launch

pytestmark = pytest.mark.nightly("programs and engines")

STEPS, REFERENCE = 20, "Lightning DDP"
# At this rate beta_t leaves its cap; much above it the run is chaotic, and rounding alone changes the curves.
SETTINGS = ["--trainer.max_steps", str(STEPS), "--model.optimizer.lr", "0.004", "--model.warmup_fraction", "0"]
SETTINGS += ["--data.val_rows", "16", "--data.final_val_rows", "32", "--trainer.val_check_interval", "10"]
SETTINGS += ["--checkpoint.every_n_train_steps", "10", "--trainer.accumulate_grad_batches", "2"]

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="DeepSpeed compiles a CPU operator; there is no g++"
)


def run_of(name: str, root: Path, corpus: Path, *extra: str) -> Curve:
    entry = ENTRY_POINTS[name]
    done = launch(entry, "laptop", root, [*SETTINGS, "--data.source", str(corpus), *extra])
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert "validation loss" in done.stdout
    return curve_of(entry, root)


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path) -> Callable[[str], Curve]:
    """Return `curve(NAME)`: the entry's run, made once."""
    runs: dict[str, Curve] = {}

    def get(name: str) -> Curve:
        if name not in runs:
            runs[name] = run_of(name, tmp_path_factory.mktemp("entry") / "run", corpus_folder)
        return runs[name]

    return get


def errors(ours: Curve, reference: Curve) -> tuple[float, float]:
    """Return the largest relative difference of the losses, and the largest difference of the mean of beta_t."""
    assert list(ours) == list(reference) == list(range(1, STEPS + 1))
    pairs = [(ours[step], reference[step]) for step in reference]
    return max(abs(a[0] / b[0] - 1) for a, b in pairs), max(abs(a[1] - b[1]) for a, b in pairs)


def test_the_reference_is_worth_comparing_with(curve: Callable[[str], Curve]) -> None:
    """The loss falls and the momentum moves, so equal curves are no accident."""
    losses, betas = zip(*curve(REFERENCE).values(), strict=True)
    assert losses[-1] < 0.95 * losses[0]
    assert sum(beta < 0.79 for beta in betas) >= 5
    assert max(betas) - min(betas) > 0.05


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    return [needs_compiler] if "DeepSpeed" in name else [pytest.mark.sample] if name == "HF Trainer DDP" else []


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks_of(name)) for name in ENTRY_POINTS if name != REFERENCE]
)
def test_the_same_curve(curve: Callable[[str], Curve], name: str) -> None:
    loss, beta = errors(curve(name), curve(REFERENCE))
    print(f"{name}: losses within {loss:.1e} relative, mean beta_t within {beta:.1e}")
    assert loss <= 1e-4
    assert beta <= 1e-4


def test_another_clip_value_is_seen(curve: Callable[[str], Curve], tmp_path: Path, corpus_folder: Path) -> None:
    """The comparison must detect a small change."""
    other = run_of("Accelerate DDP", tmp_path / "run", corpus_folder, "--trainer.gradient_clip_val", "0.9")
    assert errors(other, curve(REFERENCE))[0] > 1e-4
