"""python -m am_lightning.bench: its columns describe what was run."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest
import torch

from am_lightning.bench import models
from am_lightning.bench.__main__ import parse
from am_lightning.bench.comparison import run
from am_lightning.bench.contenders import (
    Contender,
    bytes_of_adamw,
    bytes_of_amadamw,
    make_contenders,
    make_parameters,
)
from am_lightning.bench.host import calls_of
from am_lightning.bench.measure import Measured, measure
from am_lightning.bench.models import READ
from am_lightning.bench.table import COLUMNS, rows_of, text_of
from tests.python import COLD

CPU = torch.device("cpu")


@pytest.mark.slow
def test_a_row_for_each_optimizer() -> None:
    command = [COLD, "-m", "am_lightning.bench", "--model", "many-tiny", "--repeats", "1", "--json"]
    command += ["--only", "chunked", "foreach", "C++", "bfloat16", "--weight-decay", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    report = json.loads(done.stdout)
    rows = {row["optimizer"]: row for row in report["rows"]}
    assert rows.keys() == {
        "AdamW foreach", "AdamW fused", "AMAdamW chunked", "AMAdamW foreach", "AMAdamW fused, C++ loop",
        "AMAdamW fused, bfloat16 exp_avg",
    }  # fmt: skip
    assert all(row["ms"] > 0 and row["x fused"] > 0 and row["GB/s"] > 0 and row["first s"] > 0 for row in rows.values())
    assert rows["AdamW fused"]["x fused"] == rows["AdamW fused"]["x same"] == rows["AdamW foreach"]["x same"] == 1
    assert rows["AMAdamW fused, C++ loop"]["limit"] == pytest.approx(10 / 7)
    assert rows["AMAdamW fused, bfloat16 exp_avg"]["limit"] == pytest.approx(34 / 28)
    assert "C++ loop" in rows["AMAdamW fused, C++ loop"]["kernels"] and report["left out"] == {}
    assert (report["elements"], report["tensors"], report["training seconds"]) == (160_000, 400, None)


@pytest.mark.slow
def test_each_kind_runs_its_own_kernels() -> None:
    params = make_parameters([(64, 3), (9,)], torch.float32, CPU)
    contenders, missing = make_contenders(params, decay=0.1, scope="tensor", device=CPU)
    measured, failed = measure(contenders, 1, CPU)
    kernels = {row["optimizer"]: str(row["kernels"]) for row in rows_of(measured, 1.0)}
    assert not missing and not failed
    for kind in ("single_tensor", "foreach", "C++ loop"):
        assert any(kind in name and kind in words for name, words in kernels.items()), kind
    assert "chunked" in kernels["AMAdamW chunked"] and kernels["AdamW fused"] == "torch.optim"
    kept = {id(m.contender.optimizer.state[params[0]]["exp_avg"]) for m in measured}
    assert len(kept) == 2, "one for all in float32, one in bfloat16"


def test_what_cannot_run_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(device: torch.device) -> None:
        raise RuntimeError("needs a C++ compiler")

    monkeypatch.setattr("am_lightning.optim.adamw.require_fused", nothing)
    report = run(parse(["--model", "tensors:4x50", "--repeats", "1", "--only", "foreach"]))
    assert report["left out"]["AMAdamW fused, C++ loop"] == "needs a C++ compiler"
    assert {row["optimizer"] for row in report["rows"]} == {"AdamW foreach", "AdamW fused", "AMAdamW foreach"}


@pytest.mark.parametrize(("size", "adamw", "plain", "decays"), [(4, 28, 40, 44), (2, 14, 20, 22)])
def test_bytes_of_the_word_model(size: int, adamw: int, plain: int, decays: int) -> None:
    assert bytes_of_adamw(10, size) == 10 * adamw
    assert bytes_of_amadamw(10, size, decays=False, direction=size) == 10 * plain
    assert bytes_of_amadamw(10, size, decays=True, direction=size) == 10 * decays
    if size == 4:
        assert bytes_of_amadamw(10, size, decays=True, direction=2) == 10 * 38


class Hungry:
    """Allocate 64 MiB for a moment."""

    def __init__(self) -> None:
        self.state: dict[Any, Any] = {}

    def step(self) -> None:
        torch.ones(16 * 2**20)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
def test_extra_memory_is_what_a_step_takes() -> None:
    (seen,), failed = measure([Contender("AdamW fused", "AdamW fused", Hungry(), 1)], 1, CPU)  # type: ignore[arg-type]
    assert not failed and seen.extra_bytes is not None
    assert 60 * 2**20 < seen.extra_bytes < 80 * 2**20


def test_rows_are_sorted_and_what_others_are_held_against_is_marked() -> None:
    params = make_parameters([(9,)], torch.float32, CPU)
    contenders, _ = make_contenders(params, decay=0.1, scope="tensor", device=CPU)
    seconds = {"AdamW default": 3.0, "AdamW fused": 2.0, READ: 0.5, "AMAdamW default": 4.0}
    measured = [Measured(c, 1.0, None, [seconds[c.name]]) for c in contenders if c.name in seconds]
    rows = rows_of(measured, None)
    assert [row["optimizer"] for row in rows] == [READ, "AdamW fused", "AdamW default", "AMAdamW default"]
    assert [row["mark"] for row in rows] == ["reads", "base", None, None]
    assert [row["x fused"] for row in rows] == [0.25, 1.0, 1.5, 2.0] and rows[3]["x same"] == pytest.approx(4 / 3)
    header, *lines = text_of(rows).splitlines()
    assert [line[:2] for line in lines] == ["> ", "> ", "  ", "  "]
    assert lines[1].split()[:5] == [">", "AdamW", "fused", "2000.00", "1.00"]
    assert all(name in header for name in COLUMNS)


def test_the_table_fits_a_line_and_making_is_timed() -> None:
    params = make_parameters([(9,)] * 40, torch.float32, CPU)
    contenders, _ = make_contenders(params, decay=0.1, scope="tensor", device=CPU)
    assert all(c.made is not None and c.made > 0 for c in contenders)
    rows = rows_of([Measured(c, 12.345, 2**30, [12.345]) for c in contenders], 1.0)
    assert all(row["make s"] == c.made for row, c in zip(rows, contenders, strict=True))
    lines = text_of(rows).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 120


def test_operations_of_the_host_are_counted_without_views() -> None:
    numbers = torch.ones(4, 4)  # norm calls further operators
    counts = calls_of(lambda: numbers.view(16)[2:].add_(1).norm(), CPU)
    assert counts == {"operations": 2, "launches": None, "copies": None, "waits": None}


@pytest.mark.slow
def test_a_training_step_is_what_a_recipe_does() -> None:
    """Every optimizer takes the timed steps, and the numbers are consistent."""
    from am_lightning.bench.training import STEPS, Training
    from am_lightning.pretrain.model.shape import LlamaShape, flops_per_token

    shape = LlamaShape(32, 64, 2, 1, 64, 16)
    training = Training(shape, CPU)
    assert training.rows_that_fit(5) == 4 and not training.missing
    before = {c.name: step_of(c) for c in training.contenders}
    found = training.measure(4, 2)
    assert all(step_of(c) - before[c.name] == 1 + 2 * STEPS for c in training.contenders)
    for row in found["rows"]:
        assert row["share"] == pytest.approx(max(0.0, 1 - found["forward and backward"] / row["s"]))
        assert row["tokens/s"] * row["s"] == pytest.approx(4 * 16)
        assert row["TFLOP/s"] * 1e12 == pytest.approx(row["tokens/s"] * flops_per_token(shape))
    assert all(p.grad is None for p in training.model.parameters())


def step_of(contender: Contender) -> int:
    return int(next(iter(contender.optimizer.state.values()))["step"])


@pytest.mark.slow
def test_shapes_are_those_of_the_network_and_its_step_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from am_lightning.pretrain.model.network import build_llama
    from am_lightning.pretrain.model.shape import LlamaShape

    for llama in models.LLAMAS.values():
        with torch.device("meta"):
            network = build_llama(LlamaShape(seq_len=128, **vars(llama)))
        assert sorted(tuple(p.shape) for p in network.parameters()) == sorted(llama.shapes())
    small = models.Llama(32, 64, 2, 1, 1, 64, True)
    monkeypatch.setitem(models.LLAMAS, "llama60m", small)
    monkeypatch.setitem(models.MODELS, "llama60m", small.shapes)
    report = run(parse(["--repeats", "1", "--tokens", "16", "--only", "foreach"]))
    assert report["training seconds"] > 0
    for row in report["rows"]:
        assert row["share"] == pytest.approx(row["ms"] / (row["ms"] + 1e3 * report["training seconds"]))
    assert "%" in text_of(report["rows"])
    backward, ran = torch.autograd.backward, []
    monkeypatch.setattr("torch.autograd.backward", lambda loss: ran.append(backward(loss)))
    report = run(parse(["--repeats", "2", "--tokens", "16", "--only", "foreach", "--in-training"]))
    assert len(ran) == 3 + 2 * len(report["rows"]), "three are timed, and one precedes each timed step"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--repeats", "0"], "--repeats must be >= 1"),
        (["--threads", "-1"], "--threads >= 0"),
        (["--weight-decay", "-1"], "--weight-decay must be >= 0"),
        (["--device", "nonsense"], "--device nonsense cannot be used"),
        (["--tokens", "3000"], "or a multiple of it, not 3000"),
        (["--in-training", "--tokens", "0"], "--in-training needs --tokens > 0 and one of the models llama60m, "),
        (["--in-training", "--model", "many-tiny"], "--in-training needs --tokens > 0"),
        (["--model", "gpt"], "--model must be one of llama1b, "),
        (["--model", "tensors:0x5"], "tensors:NxM, N tensors (at most 1,000,000) of M elements, not 'tensors:0x5'"),
        (["--model", "tensors:5x0"], "not 'tensors:5x0'"),
        (["--model", "tensors:1000001x1"], "not 'tensors:1000001x1'"),
        (["--model", "tensors:4"], "not 'tensors:4'"),
        (["--model", "tensors:4x-1"], "not 'tensors:4x-1'"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("module", ["bench", "bench.page", "recipes bench"])
def test_the_help_does_not_import_torch(module: str) -> None:
    name, *more = module.split()
    command = [COLD, "-X", "importtime", "-m", f"am_lightning.{name}", *more, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "usage: " in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "am_lightning" in imported and not imported & {"torch", "numpy", "lightning"}


@pytest.mark.parametrize(("name", "tensors", "elements"), [("tensors:3x50", 3, 50), ("tensors:10000x100", 10_000, 100)])
def test_tensors_of_any_number_and_size(name: str, tensors: int, elements: int) -> None:
    assert models.shapes_of(parse(["--model", name]).model) == [(elements,)] * tensors


def test_some_are_left_out_by_name_and_a_name_that_is_none_is_refused() -> None:
    options = ["--model", "tensors:3x5", "--repeats", "1", "--json"]
    report = run(parse([*options, "--only", "AdamW", "--without", "AMAdamW", "single", "fused"]))
    assert {row["optimizer"] for row in report["rows"]} == {"AdamW default", "AdamW foreach", "AdamW fused"}
    assert (report["tensors"], report["elements"]) == (3, 15)
    assert (
        report["command"].endswith("--only AdamW --without AMAdamW single fused") and "--json" not in report["command"]
    )
    for option in ("--only", "--without"):
        with pytest.raises(SystemExit, match=r"'singel' is in no name of AdamW default, AdamW single"):
            run(parse([*options, option, "singel"]))
