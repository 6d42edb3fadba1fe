"""The notebook of docs/start.md runs from its first cell to its last, and it is saved with the outputs of a run."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from .programs import START

NOTEBOOK = START / "side_by_side.ipynb"
SKIP = "skip-execution"  # the tag of the cell that installs the package


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def losses(notebook: Any) -> list[float]:
    text = "".join(output.text for output in outputs(notebook) if output.output_type == "stream")
    return [float(loss) for loss in re.findall(r"AdamW (\d+\.\d+)", text)]


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_the_saved_notebook_has_its_losses_and_curves() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (install,) = (cell.source for cell in notebook.cells if SKIP in cell.metadata.get("tags", []))
    (folder,) = re.findall(r'^%pip install --quiet "(\S+)\[lightning\]" matplotlib$', install)
    assert (NOTEBOOK.parent / folder / "pyproject.toml").is_file()
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and SKIP not in cell.metadata.get("tags", [])]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "cells were run out of order"
    assert len(losses(notebook)) == 2
    assert pictures(notebook) == 1
    assert not [output for output in outputs(notebook) if output.output_type == "error"]


@pytest.mark.nightly("notebook")
def test_the_notebook_runs_whole(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    saved = losses(notebook)
    NotebookClient(
        notebook, timeout=900, skip_cells_with_tag=SKIP, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    found = losses(notebook)
    assert found == pytest.approx(saved, abs=0.1), "the saved losses are of another notebook"
    assert pictures(notebook) == 1
    with next(tmp_path.glob("runs/am_adamw/*/metrics.csv")).open() as lines:
        betas = [float(row["am/beta/mean"]) for row in csv.DictReader(lines) if row["am/beta/mean"]]
    assert len(betas) >= 50
    assert all(0 < beta <= 0.8901 for beta in betas)
    assert min(betas) < 0.88, "beta_t hardly left its cap"
