"""Each program ends once in each way; endings.py repeats them."""

from __future__ import annotations

from pathlib import Path

import pytest

from .endings import KINDS, PROGRAMS, end
from .namespaces import Node


@pytest.mark.nightly("endings")
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_over_two_nodes_ends_once(
    program: str, tmp_path: Path, corpus_folder: Path, nodes: tuple[Node, Node]
) -> None:
    for kind in KINDS if program == "pretrain.py" else ("finished", "SIGTERM", "error"):
        name = "run" if kind in ("finished", "validate") else kind
        assert end(nodes, tmp_path / name, corpus_folder, program, kind) == "", kind
