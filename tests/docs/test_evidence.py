"""What the pages say of AM's worth is on the pages that the studies write."""

from __future__ import annotations

import re

import pytest

from .programs import ROOT

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
_MEASURED = re.compile(r"\d\.\d{3} (?:± \d\.\d{3}|\(\d\.\d{3}\))")  # a difference, or a mean (sd)
# What no page of a study has. Each page that gives one of these says so.
ELSEWHERE = {
    "0.055 ± 0.065": "the first study's warmup, AdamW 0.9: its ledger was not kept",
    "0.011 ± 0.027": "the same, AdamW 0.8",
    "0.023 ± 0.022": "8 rows at the learning rates of the first rule",
    "0.021 ± 0.035": "32 rows at the same rates",
    "0.006 ± 0.062": "the same, against AdamW 0.65",
    "0.046 ± 0.050": "the laptop recipe with and without warmup, whose five pairs are in docs/recipes.md",
}


def measured(text: str) -> set[str]:
    """Return the results with their spread that are in a text."""
    return set(_MEASURED.findall(text))


@pytest.fixture(scope="module")
def studies() -> set[str]:
    return {found for page in (ROOT / "docs" / "evidence").glob("*.md") for found in measured(page.read_text())}


@pytest.mark.parametrize("page", PAGES)
def test_a_result_is_on_a_page_that_a_study_wrote(page: str, studies: set[str]) -> None:
    assert measured((ROOT / page).read_text()) - studies - ELSEWHERE.keys() == set()


def test_results_without_a_page_are_still_in_use(studies: set[str]) -> None:
    used = {found for page in PAGES for found in measured((ROOT / page).read_text())}
    assert ELSEWHERE.keys() <= used - studies and len(used) > 100
