"""python -m am_lightning.bench.page: saved runs become the results on a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from am_lightning.bench import page
from am_lightning.bench.__main__ import parse
from am_lightning.bench.comparison import run
from am_lightning.bench.page import BEGIN, END, NOTHING, main, read_runs, results, written
from tests.package.tree import ROOT

DOCS = ROOT / "docs"
RUNS = DOCS / "evidence" / "performance"


def row(name: str, ms: float, fused: float, **others: Any) -> dict[str, Any]:
    numbers = {"x same": None, "limit": None, "GB/s": 2.0, "extra MiB": 0.25, "make s": 0.001, "first s": 0.5}
    return {"optimizer": name, "ms": ms, "x fused": fused, "share": None, "mark": None} | numbers | others


def report(rows: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
    about = {"model": "tensors:4x50", "device": "cpu", "threads": 2, "dtype": "float32", "weight_decay": 0.1}
    about |= {"scope": "tensor", "cpu_time": False, "hardware": "A CPU, 2 threads", "torch": "2.13.0", "repeats": 8}
    about |= {"tensors": 4, "elements": 200, "date": "2026-11-28", "left out": {}, "rows": rows}
    return about | {"command": "python -m am_lightning.bench --threads 2"} | others


def cells(text: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in lines}


def test_runs_of_one_configuration_are_one_table() -> None:
    base = {"mark": "base"}
    runs = [
        report([row("AdamW fused", 10.0, 1.0, **base), row("ours", 21.0, 2.1)]),
        report([row("AdamW fused", 30.0, 1.0, **base), row("ours", 16.0, 1.7), row("late", 1.0, 0.1)]),
        report([row("AdamW fused", 20.0, 1.0, **base), row("ours", 15.0, 1.5)], date="2026-11-30"),
    ]
    text = results(runs)
    assert text == results(runs[::-1])
    table = cells(text)
    assert [*table] == ["", "---", "late", "ours", "**AdamW fused**"]
    assert table["ours"][:2] == ["16.00", "1.70 (1.50 to 2.10)"] and table["**AdamW fused**"][:2] == ["20.00", "1.00"]
    assert table["ours"][2:] == ["-", "-", "2.0", "0.2", "0.001", "0.500", "-"]
    assert "### tensors:4x50, 2 threads" in text and "200 elements in 4 tensors, float32, weight decay 0.1" in text
    assert "3 runs of 8 rounds, seconds on the clock: medians over the runs (lowest to highest)." in text
    assert "A CPU, 2 threads, torch 2.13.0, 2026-11-28 to 2026-11-30." in text
    assert text.count("    python -m am_lightning.bench --threads 2\n") == 1


def test_other_configurations_are_other_tables() -> None:
    rows = [row("AdamW fused", 10.0, 1.0)]
    runs = [
        report(rows, threads=threads, model=model, **{"left out": {"Prodigy": "needs\nprodigyopt"}})
        for threads in (2, 1)
        for model in ("llama60m", "tensors:4x50")
    ]
    text = results([*runs, report(rows, device="cuda", hardware="A GPU", cpu_time=False)])
    headings = [line for line in text.splitlines() if line.startswith("###")]
    models = [
        f"### {model}, {threads}" for model in ("llama60m", "tensors:4x50") for threads in ("1 thread", "2 threads")
    ]
    assert headings == [*models, "### tensors:4x50, cuda"]
    assert text.count("One run of 8 rounds") == 5 and text.count("Prodigy is left out: needs prodigyopt.") == 4


def test_what_the_bench_prints_becomes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name in ("a", "b"):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(run(parse(["--model", "tensors:4x50", "--repeats", "1", "--only", "default"]))))
    to = tmp_path / "page.md"
    to.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    for _ in range(2):  # writing twice changes nothing
        main([*map(str, files), "--to", str(to)])
        text = to.read_text()
        assert text == f"before\n\n{BEGIN}\n\n{results(read_runs(files))}\n\n{END}\n\nafter\n"
    assert cells(text).keys() == {"", "---", "**AdamW fused**", "AdamW default", "AMAdamW default"}
    assert "    python -m am_lightning.bench --model tensors:4x50 --repeats 1 --only default\n" in text
    assert capsys.readouterr().out == f"{to}\n{to}\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is not the output of python -m am_lightning.bench --json"),
        ("[]", "is not the output of python -m am_lightning.bench --json"),
        (json.dumps(report([])), "is a run without rows"),
        (
            json.dumps(report([{"optimizer": "old", "ms": 1.0}])),
            "is a run without GB/s, extra MiB, first s, limit, make s",
        ),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_run_is_refused(content: str | None, words: str, tmp_path: Path) -> None:
    to, path = tmp_path / "page.md", tmp_path / "run.json"
    to.write_text(f"{BEGIN}{END}")
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=words):
        main([str(path), "--to", str(to)])
    assert to.read_text() == f"{BEGIN}{END}"


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}"])
def test_a_page_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="the page must have"):
        written(text, [])


def test_the_committed_page_is_what_the_committed_runs_give() -> None:
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert written(text, read_runs(sorted(RUNS.glob("*.json")))) == text, page.__doc__


def test_nothing_measured_is_reported() -> None:
    assert results([]) == NOTHING
