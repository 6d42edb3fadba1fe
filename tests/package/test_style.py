"""Words that docs/contributing/style.md replaces do not come back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FOLDERS = ("am_lightning", "recipes", "tests", "docs")
SUFFIXES = {".py", ".sh", ".sbatch", ".yaml", ".md", ".cpp", ".h", ".ipynb"}
QUOTING = {Path("docs/contributing/style.md"), Path("tests/package/test_style.py")}

PATTERNS = {
    "but for": r"\bbut for\b",
    "go on": r"\b(goes|go|gone|went) on\b",
    "anew": r"\banew\b",
    "in words": r'(#|""").*\bin words\b',
    "where there is none": r"\bwhere there (is|are|was|were) none\b",
    "of the others": r"\bof the others\b",
    "for, as a reason": r", for (it|they|there|schedulers|nobody|somebody|each|everything) \w+",
    "the text says": r"\bthe text (says|names|has|holds)\b",
    "What ..., as a first line": r'"""What (is|are|was|to|[a-z]+s) ',
    "for ever": r"\bfor ever\b",
    "Of ..., as a first line": r'"""(Of|Nor) ',
    "# of ..., beside code": r"\S +# (of|by) [a-zA-Z]",
    "is no ...": r"(?<!there )\bis no (file|checkpoint|pattern|command|folder|program)\b",
}


def _files() -> list[Path]:
    inside = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    return [path for path in (*ROOT.glob("*.md"), *inside) if path.relative_to(ROOT) not in QUOTING]


def test_words_of_the_style_page() -> None:
    found = []
    for path in _files():
        text = path.read_text()
        for name, pattern in PATTERNS.items():
            for match in re.finditer(pattern, text):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{path.relative_to(ROOT)}:{line}: {match.group()!r} ({name})")
    assert not found, "\n".join([*found, "see docs/contributing/style.md"])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("nothing waits, but for numbers that the host reads", "but for"),
        ("a resumed run goes on as if it had not stopped", "go on"),
        ("kept, for schedulers may cycle it", "for, as a reason"),
        ("the text names the parameter", "the text says"),
        ("weight_decay: of the others", "of the others"),
        ("leftover.unlink()  # of a killed process", "# of ..., beside code"),
    ],
)
def test_patterns_find_the_old_words(text: str, name: str) -> None:
    assert re.search(PATTERNS[name], text)
