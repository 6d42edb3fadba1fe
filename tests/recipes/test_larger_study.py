"""The study of a larger model: its model, and its page from runs with invented losses."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest

pytest.importorskip("scipy.stats")

from am_lightning.pretrain.model.shape import LlamaShape, count_parameters
from am_lightning.pretrain.runtime.paths import find_config
from am_lightning.pretrain.runtime.settings import read_recipe
from recipes.studies.larger import RECIPE, study
from recipes.studies.ledger import Ledger
from recipes.studies.pretraining.batches import FOUR
from recipes.studies.pretraining.run import Scale, setup_of
from recipes.studies.pretraining.tuning import Tuning


def test_the_model_is_twice_as_deep_and_wide_as_the_laptop_recipes() -> None:
    larger, laptop = (LlamaShape.among(read_recipe(find_config(name))["model"]) for name in (RECIPE, "laptop"))
    assert (larger.num_layers, larger.hidden_size) == (2 * laptop.num_layers, 2 * laptop.hidden_size)
    assert larger.intermediate_size == 2 * laptop.intermediate_size
    assert larger.hidden_size // larger.num_heads == laptop.hidden_size // laptop.num_heads
    assert count_parameters(larger) == pytest.approx(6.45e6, rel=0.01)


def test_the_page_has_the_differences_of_the_cells_that_are_complete(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "larger.jsonl", setup_of(RECIPE))
    tuning = Tuning(ledger, Scale(RECIPE, 300, 8), FOUR)

    def add(configs: list[dict]) -> None:
        for config in configs:
            method, seed = config["method"], config["seed"]
            gain = 0.02 if method["kind"] == "am" else 0.001 * seed  # AdamW's loss varies with the seed
            loss = 1.5 + 0.1 * math.log2(config["lr"] / 1.4e-3) ** 2 - method["warmup"] - gain
            ledger.add(config, {"val_loss": loss, "losses": []})

    while configs := list(tuning.missing()):
        add(configs)
    options = argparse.Namespace(out=tmp_path, batches=[8, 32], steps=300, begin_with=None, write=True, workers=1)
    assert "Not complete: 8 rows x 300 steps." in study(options, "the command"), "no fresh seed was run"
    add(list(tuning.finalist_configs()))
    page = study(options, "the command")
    assert "## 8 rows x 300 steps" in page and "Not complete: 32 rows x 300 steps." in page
    row = next(line for line in page.splitlines() if line.startswith("| AdamW 0.8, warmup 15%") and "±" in line)
    assert "-0.017 ± 0.002 (0.003)" in row, "the mean of 0.02 - 0.001 * seed over seeds 1 to 5; t(1 - 0.025 / 4, 4)"
    assert page == (tmp_path / "larger.md").read_text()
