"""The batch study: its tuning rule, the gradient's noise, and the page, from runs with invented losses."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("scipy.stats")

from am_lightning.pretrain.runtime.errors import RecipeError
from recipes.studies.ledger import Config, Ledger, Result
from recipes.studies.pretraining.batch_page import write
from recipes.studies.pretraining.batches import ALL, FEW, FIVE, STAGES, WARM, finalists, kinds_of, missing
from recipes.studies.pretraining.methods import Method
from recipes.studies.pretraining.run import Scale, noise_scale, noisy_backward, pretrain
from recipes.studies.pretraining.tuning import COARSE, RATES, Families, Tuning
from recipes.studies.sweep import interval

KINDS = kinds_of(300, 64, [8, 32, 64, 128])
CELLS = list(dict.fromkeys(cell for cells in KINDS.values() for cell in cells))


def made_up(config: Config) -> Result:
    """Return a parabola in the logarithm of the rate, whose minimum depends on the method; large rates diverge."""
    method, lr = Method(**config["method"]), config["lr"]
    ours = method.kind == "am"
    best = math.log2(2e-3) + 4 * method.warmup - 3 * (method.beta1 - 0.8) + 0.5 * ours
    loss = 1.4 + 0.05 * (math.log2(lr) - best) ** 2 + (1 if ours else 4) * (method.beta1 - 0.8) ** 2
    loss -= 0.2 * method.warmup
    result: Result = {"val_loss": None if lr > 0.03 else loss + 0.001 * config["seed"] * (1 + ours), "losses": []}
    if config["traces"]:
        steps = config["steps"]
        result |= {
            "names": ["layers.0.mlp.up_proj.weight", "norm.weight"],
            "betas": [[method.beta1, 0.5]] * steps,
            "noise": [(3.0, 1.0)] * steps,
        }
    return result


def fill(
    ledger: Ledger, stages: tuple[str, ...] = STAGES, *, cells: int = len(CELLS), families: Families = FEW
) -> None:
    """Write all runs of a study with invented losses."""
    for cell in CELLS[:cells]:
        tuning = Tuning(ledger, cell, families)
        for stage in stages:
            while configs := list(missing(stage, tuning)):
                for config in configs:
                    ledger.add(config, made_up(config))


@pytest.fixture(params=[FIVE, FEW, WARM, ALL], ids=["five", "few", "warm", "all"])
def tuned(tmp_path: Path, request: pytest.FixtureRequest) -> Tuning:
    ledger = Ledger(tmp_path / "batch.jsonl")
    fill(ledger, ("tune",), cells=1, families=request.param)
    return Tuning(ledger, CELLS[0], request.param)


def test_cells_see_as_many_steps_or_as_many_rows() -> None:
    assert len(CELLS) == 7
    for cell in CELLS:
        assert cell.steps == 300 or cell.steps * cell.batch_size == 300 * 64


def test_every_best_rate_lies_inside_its_grid(tuned: Tuning) -> None:
    for method in (method for family in tuned.families.values() for method in family):
        tried = list(tuned.tried(method))
        assert len(tried) >= 4 and tried[0] < tuned.best_rate(method) < tried[-1], method


def test_what_is_close_to_its_familys_best_is_tuned_finer(tuned: Tuning) -> None:
    for family in tuned.families.values():
        losses = {method: tuned.best_loss(method, fine=False) for method in family}
        bare = {method: loss for method, loss in losses.items() if not method.warmup}
        fine = {method for method in family if tuned.tried(method).keys() - {*COARSE}}
        close = {method for rows in (losses, bare) for method in rows if rows[method] <= min(rows.values()) + 0.05}
        assert fine == close
    chosen = [tuned.best_rate(method) for method in tuned.families["AM-AdamW"]]
    assert not {*COARSE}.issuperset(chosen), "a finer rate is chosen if it is better"


def test_adamw_gets_at_least_as_many_runs_as_am(tuned: Tuning) -> None:
    runs = {name: sum(len(tuned.tried(method)) for method in family) for name, family in tuned.families.items()}
    assert runs["AdamW"] >= runs["AM-AdamW"]


def test_the_grid_ends_at_its_limits(tmp_path: Path) -> None:
    """A method that only improves still ends the study at the limits."""
    method = Method("adamw")
    tuning = Tuning(Ledger(tmp_path / "x.jsonl"), CELLS[0], {"AdamW": (method,)})
    while configs := list(tuning.missing()):
        for config in configs:
            tuning.ledger.add(config, {"val_loss": -config["lr"], "losses": []})
    assert tuning.best_rate(method) == RATES[-1] == 0.064


def test_finalists_are_the_best_of_the_tuning_on_fresh_seeds(tuned: Tuning) -> None:
    methods = finalists(tuned)
    assert len(set(methods)) == len(methods)
    groups = [*tuned.families.items()]
    for shorter in (FIVE, FEW, WARM):
        groups += [(name, [m for m in family if m in tuned.methods]) for name, family in shorter.items()]
    for name, family in groups:
        if not family:
            continue
        best = min(map(tuned.best_loss, family))
        assert {method for method in family if tuned.best_loss(method) <= best + 0.02} <= {*methods}
        if name in ("AdamW", "AM-AdamW"):
            bare = {method: tuned.best_loss(method) for method in family if not method.warmup}
            assert {method for method, loss in bare.items() if loss <= min(bare.values()) + 0.02} <= {*methods}
    runs = list(missing("compare", tuned))
    assert {config["seed"] for config in runs} == {1, 2, 3, 4, 5} and tuned.sweep_seed == 0
    assert len(runs) == 5 * len(methods)


def test_a_later_stage_needs_the_tuning(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no run of AdamW 0\.9, no warmup at 8 rows x 300 steps yet"):
        list(missing("compare", Tuning(Ledger(tmp_path / "x.jsonl"), CELLS[0], FEW)))


def test_the_largest_usable_rate_lies_between_the_rates_tried(tuned: Tuning) -> None:
    method = Method("adamw", 0.8)
    best = tuned.best_loss(method)
    usable = tuned.largest_usable(method, best + 0.03)
    exact = 2 ** (math.log2(2e-3) + math.sqrt(0.03 / 0.05))
    assert usable == pytest.approx(exact, rel=0.05)
    assert math.isnan(tuned.largest_usable(method, best - 0.1))


def test_corrected_intervals_are_wider_by_students_quantile() -> None:
    values = [0.1, 0.2, 0.25, 0.3, 0.4]
    widths = [interval(values, comparisons=m).half_width for m in (1, 5)]
    assert widths[1] / widths[0] == pytest.approx(4.6041 / 2.7764, rel=1e-4)  # t(0.995, 4), t(0.975, 4) of a table


def test_the_noise_scale_of_planted_noise() -> None:
    torch.manual_seed(0)
    weight, mean, spread = torch.zeros(50, requires_grad=True), 0.3 * torch.ones(50), 2.0
    norms = []
    for _ in range(400):
        rows = mean + spread * torch.randn(64, 50)
        loss, *found = noisy_backward([weight], rows.split(8), lambda part: (part @ weight).mean())
        torch.testing.assert_close(weight.grad, rows.mean(0))
        assert loss == 0.0
        norms.append(found)
    part, batch = np.array(norms).T
    assert noise_scale(part, batch, 8, 64) == pytest.approx(spread**2 * 50 / (0.3**2 * 50), rel=0.05)
    assert noise_scale(np.array([8.0]), np.array([1.0]), 8, 64) == math.inf


@pytest.mark.slow
def test_a_traced_run_has_the_noise_and_the_same_losses(tmp_path: Path) -> None:
    config = Scale(steps=3, batch_size=8).config(Method("am", 0.89, 0.05), 1e-3, 0)
    plain = pretrain(str(tmp_path), config)
    traced = pretrain(str(tmp_path), config | {"micro_batch_size": 2, "traces": True})
    np.testing.assert_allclose(traced["losses"], plain["losses"], atol=2e-4)
    assert traced["val_loss"] == pytest.approx(plain["val_loss"], abs=1e-4)
    assert len(traced["noise"]) == len(traced["betas"]) == 3 and "noise" not in plain
    assert all(part > batch > 0 for part, batch in traced["noise"])


def test_the_page_has_the_cells_that_are_complete(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "batch.jsonl")
    fill(ledger, cells=2)
    fill(ledger, cells=1, families=ALL)
    fill(ledger, ("tune",), cells=3)
    text = write(ledger, KINDS, tmp_path, "python -m recipes.studies.batch")
    assert "With few methods: 32 rows x 300 steps. With all methods: 8 rows x 300 steps. Not complete: 64 rows" in text
    assert text.count("## Finalists: ") == 2 and text.count("## Tuning: ") == 3
    summary = text.split("## Summary")[1].split("![")[0]
    first, second = (line for line in summary.splitlines() if "+0.003 ± 0.004" in line)  # invented: AM's seeds increase
    assert "0.8 w15%" in first and "0.8 w5%" in second and "w15%" not in second
    table = [line.strip("| ") for line in text.splitlines() if line.startswith("| A") and " minus " in line]
    pairs = {name.strip(): [cell.strip() for cell in cells] for name, *cells in (row.split("|") for row in table)}
    assert pairs["AM-AdamW 0.8, warmup 15% minus AdamW 0.8, warmup 15%"] == ["+0.003 ± 0.002 (0.004)"]
    assert len(pairs["AM-AdamW 0.89 minus AdamW 0.9, warmup 5%"]) == 2
    rows = [line.replace(" ", "") for line in text.splitlines() if line.startswith(("| mlp", "| norm", "| all"))]
    assert rows == ["|mlp|100%|100%|100%|100%|", "|norm|0%|0%|0%|0%|", "|all|50%|50%|50%|50%|"]
    for name in ("batch-gains.png", "batch-learning-rates.png", "batch-smallest.png", "batch-momentum.png"):
        assert Image.open(tmp_path / name).width > 400
    fill(ledger, cells=4, families=FIVE)
    text = write(ledger, KINDS, tmp_path, "")
    assert "With five methods: 64 rows x 300 steps; 128 rows x 300 steps. With few" in text
    assert len([line for line in text.splitlines() if line.startswith("| 128 rows x 300 steps ")]) == 1, "no trace"
    fill(ledger, cells=3, families=WARM)
    text = write(ledger, KINDS, tmp_path, "")
    assert "With warm methods: 32 rows x 300 steps; 64 rows x 300 steps. With all methods: 8 rows x 300 steps." in text
    fill(ledger, families=ALL)
    assert "Not complete" not in write(ledger, KINDS, tmp_path, "")


def test_all_methods_extend_few(tmp_path: Path) -> None:
    """An interrupted study makes the same choices."""
    few, cut = Ledger(tmp_path / "few.jsonl"), Ledger(tmp_path / "cut.jsonl")
    fill(few, cells=1)
    for config in list(missing("tune", Tuning(cut, CELLS[0], FEW)))[:30]:
        cut.add(config, made_up(config))
    fill(Ledger(cut.path), cells=1)
    lines = [set(ledger.path.read_text().splitlines()) for ledger in (few, cut)]
    assert lines[0] == lines[1]
    fill(few, cells=1, families=ALL)
    assert set(few.path.read_text().splitlines()) > lines[0]
