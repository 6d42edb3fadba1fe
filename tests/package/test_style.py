"""Words that docs/contributing/style.md replaces do not come back into the files that have been rewritten."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CLEAN = (
    "am_lightning/__init__.py",
    "am_lightning/distributed",
    "am_lightning/lightning",
    "am_lightning/loggers",
    "am_lightning/optim/__init__.py",
    "am_lightning/optim/adamw.py",
    "am_lightning/optim/argument_hints.py",
    "am_lightning/optim/base.py",
    "am_lightning/optim/checkpointing.py",
    "am_lightning/optim/closed_form.py",
    "am_lightning/optim/convert.py",
    "am_lightning/optim/gradient_clipping.py",
    "am_lightning/optim/group_checks.py",
    "am_lightning/optim/intervals.py",
    "am_lightning/optim/kernels/__init__.py",
    "am_lightning/optim/kernels/agreement.py",
    "am_lightning/optim/kernels/buckets.py",
    "am_lightning/optim/kernels/compiled.py",
    "am_lightning/optim/kernels/cpu",
    "am_lightning/optim/kernels/foreach.py",
    "am_lightning/optim/kernels/inputs.py",
    "am_lightning/optim/kernels/plan.py",
    "am_lightning/optim/kernels/registry.py",
    "am_lightning/optim/kernels/rounding.py",
    "am_lightning/optim/kernels/single_tensor.py",
    "am_lightning/optim/kernels/transfer.py",
    "am_lightning/optim/kernels/triton/__init__.py",
    "am_lightning/optim/kernels/triton/check.py",
    "am_lightning/optim/kernels/triton/kernels.py",
    "am_lightning/optim/kernels/triton/launch.py",
    "am_lightning/optim/kernels/triton/row_kernels.py",
    "am_lightning/optim/kernels/triton/row_launch.py",
    "am_lightning/optim/kernels/triton/tables.py",
    "am_lightning/optim/kernels/workspace.py",
    "am_lightning/optim/param_groups.py",
    "am_lightning/optim/param_layout.py",
    "am_lightning/optim/param_state.py",
    "am_lightning/optim/reference.py",
    "am_lightning/optim/sgd.py",
    "am_lightning/optim/squares.py",
    "am_lightning/optim/state_dict_checks.py",
    "am_lightning/optim/state_store.py",
    "am_lightning/optim/step_inputs.py",
    "am_lightning/optim/step_stats.py",
    "am_lightning/optim/unwrap.py",
    "am_lightning/optim/validation.py",
)  # files or folders; add one when it has been rewritten

PATTERNS = {
    "but for": r"\bbut for\b",
    "go on": r"\b(goes|go|gone|went) on\b",
    "anew": r"\banew\b",
    "in words": r"\bin words\b",
    "where there is none": r"\bwhere there (is|are|was|were) none\b",
    "of the others": r"\bof the others\b",
    "for, as a reason": r", for (it|they|there|schedulers|nobody|somebody|each|everything) \w+",
    "the text says": r"\bthe text (says|names|has|holds)\b",
    "What ..., as a first line": r'"""What (is|are|was|[a-z]+s) ',
}


def _files() -> list[Path]:
    named = [ROOT / name for name in CLEAN]
    return [file for path in named for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_words_of_the_style_page(path: Path) -> None:
    text = path.read_text()
    found = [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()!r} ({name})"
        for name, pattern in PATTERNS.items()
        for match in re.finditer(pattern, text)
    ]
    assert not found, "\n".join([*found, "see docs/contributing/style.md"])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("nothing waits, but for numbers that the host reads", "but for"),
        ("a resumed run goes on as if it had not stopped", "go on"),
        ("kept, for schedulers may cycle it", "for, as a reason"),
        ("the text names the parameter", "the text says"),
        ("weight_decay: of the others", "of the others"),
    ],
)
def test_patterns_find_the_old_words(text: str, name: str) -> None:
    assert re.search(PATTERNS[name], text)
