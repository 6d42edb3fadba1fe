"""The studies: their ledger, statistics and protocols, and small runs of the real programs."""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import math
import os
import pickle
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

stats = pytest.importorskip("scipy.stats")  # the studies import scipy and scikit-learn
pytest.importorskip("sklearn")

from am_lightning import AMAdamW
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.recipe_text import recipe_text
from recipes.studies import diagnoses
from recipes.studies.convex.methods import METHODS, descend, make_optimizer
from recipes.studies.convex.protocol import LOGISTIC, logistic
from recipes.studies.ledger import Config, Ledger, Result
from recipes.studies.loss_spikes import count_spikes
from recipes.studies.page import command_of, markdown
from recipes.studies.pretraining.methods import Method, fix_momentum
from recipes.studies.pretraining.methods import make_optimizer as make_adamw
from recipes.studies.pretraining.report import report
from recipes.studies.pretraining.results import mean_curve
from recipes.studies.pretraining.run import Scale, pretrain
from recipes.studies.pretraining.stages import STAGES, Study
from recipes.studies.sweep import Sweep, difference, paired
from recipes.studies.vision.images import load_images
from recipes.studies.vision.networks import NETWORKS
from recipes.studies.vision.stages import read_task, sweep_of
from recipes.studies.vision.stages import report as vision_report
from tests.python import PYTHON

from .commands import RECIPES, TINY

STUDIES = RECIPES / "studies"


def square(config: Config) -> Result:
    return {"square": config["x"] ** 2}


@pytest.mark.slow
def test_a_ledger_resumes_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    Ledger(path).run([{"x": 2}, {"x": 3}], square, workers=2)
    before = path.read_text()
    ledger = Ledger(path)
    ledger.run([{"x": 3}, {"x": 2}, {"x": 4}, {"x": 4}], square)
    assert path.read_text().startswith(before)
    assert len(path.read_text().splitlines()) == 3
    assert [ledger[{"x": x}]["square"] for x in (2, 3, 4)] == [4, 9, 16]


@pytest.mark.slow
def test_a_ledger_takes_no_runs_of_another_setup(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    Ledger(path, {"recipe": "a", "Python": "3.11"}).run([{"x": 2}], square)
    again = Ledger(path, {"recipe": "a", "Python": "3.11"})
    assert {"x": 2} in again and torch.__version__.partition("+")[0] in again.made()
    with pytest.raises(RecipeError, match=r"another setup \(recipe a -> b\)\. Give another --out"):
        Ledger(path, {"recipe": "b", "Python": "3.11"})


def test_a_page_says_the_command_that_makes_it() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("--steps", 400), ("--micro-batch-size", None), ("--out", "x"), ("--device", "cpu")):
        parser.add_argument(name, default=value)
    parser.add_argument("--batches", type=int, nargs="+", default=[8])
    options = parser.parse_args(["--out", "y", "--micro-batch-size", "8", "--steps", "800", "--batches", "16", "32"])
    assert command_of("pretraining", parser, options) == (
        "python -m recipes.studies.pretraining --steps 800 --micro-batch-size 8 --batches 16 32"
    )


def test_a_diverged_run_is_reported(tmp_path: Path) -> None:
    for comparisons in (1, 4):
        assert difference({1: math.inf, 2: 1.0}, {1: 1.0, 2: 1.0}, comparisons=comparisons) == "diverged (n=2)"
    ledger = Ledger(tmp_path / "runs.jsonl")
    for x, losses in ((1, [3.0, 2.0, 1.0]), (2, [3.0, None])):
        ledger.add({"x": x}, {"losses": losses})
    mean, _ = mean_curve(ledger, [{"x": 1}, {"x": 2}], window=1)
    assert mean[0] == 3 and np.isnan(mean[1:]).all()


def test_a_ledger_names_its_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"config": {"x": 2}, "result": {}}\n{"config": {"x"')
    with pytest.raises(RecipeError, match=r"runs.jsonl:2 is not a finished run .* Delete the line"):
        Ledger(path)


def test_intervals_are_students() -> None:
    first, second = {1: 1.0, 2: 1.5, 3: 1.2, 9: 7.0}, {1: 1.2, 2: 1.4, 3: 1.9, 4: 0.0}
    found = paired(first, second)
    test = stats.ttest_rel([1.0, 1.5, 1.2], [1.2, 1.4, 1.9]).confidence_interval(0.95)
    assert found.samples == 3
    assert found.mean - found.half_width == pytest.approx(test.low)
    assert found.mean + found.half_width == pytest.approx(test.high)
    with pytest.raises(ValueError, match="no shared seed"):
        paired({1: 1.0}, {2: 1.0})


def test_a_table_is_markdown() -> None:
    assert markdown(["a", "bb"], [["1", "22222"]]) == "| a   | bb    |\n| --- | ----- |\n| 1   | 22222 |"
    with pytest.raises(ValueError, match="has 1 cells, the header 2"):
        markdown(["a", "b"], [["1"]])


def test_a_sweep_picks_on_one_seed_and_compares_on_others(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "runs.jsonl")
    sweep = Sweep(
        ledger,
        ["a", "b"],
        rates=lambda method: (0.1, 1.0),
        config=lambda method, lr, seed: {"method": method, "lr": lr, "seed": seed},
        score="loss",
        unit="loss",
        fresh_seeds=(1, 2),
    )
    with pytest.raises(RecipeError, match=r"no run of a at 0\.1 yet"):
        list(sweep.finalist_configs())
    for config in sweep.sweep_configs():
        diverges = config["method"] == "b" and config["lr"] == 1.0
        ledger.add(config, {"loss": None if diverges else config["lr"] * (1 if config["method"] == "b" else -1)})
    assert {(c["method"], c["lr"], c["seed"]) for c in sweep.finalist_configs()} == {
        ("a", 1.0, 1), ("a", 1.0, 2), ("b", 0.1, 1), ("b", 0.1, 2)
    }  # fmt: skip
    for config in sweep.finalist_configs():
        ledger.add(config, {"loss": config["seed"] + (0.5 if config["method"] == "b" else 0.0)})
    assert "diverged" in sweep.sweep_table()
    assert "-0.500 ± 0.000 (n=2)" in sweep.differences_table(["a"])


def test_spikes() -> None:
    losses = [2.0] * 100
    losses[30] = losses[70] = losses[80] = 3.0  # the first is before the count begins
    assert count_spikes(losses) == 2
    assert count_spikes([*losses, None]) == 3


@pytest.mark.parametrize("name", LOGISTIC)
def test_the_minimum_of_a_logistic_problem(name: str) -> None:
    """Newton's method from scratch ends at the minimum that the study subtracts, and the curvature bound holds."""
    problem = logistic(name)
    x = torch.zeros(problem.size, dtype=torch.float64)
    assert torch.linalg.eigvalsh(torch.autograd.functional.hessian(problem.loss, x))[-1] <= problem.smoothness + 1e-9
    if problem.size < 100:
        for _ in range(30):
            gradient = torch.autograd.functional.jacobian(problem.loss, x)
            x = x - torch.linalg.solve(torch.autograd.functional.hessian(problem.loss, x), gradient)
        assert float(problem.loss(x)) == pytest.approx(problem.minimum, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_the_averaged_forms(method: str) -> None:
    """Each method equals its recursion in numpy, on a quadratic: d' = beta d + (1 - beta) g, d_0 = g_0."""
    curvatures, lr, beta = torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64), 0.9, 0.8
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = make_optimizer(method, beta, lr, x)
    losses = descend(lambda point: (curvatures * point.square()).sum() / 2, optimizer, x, 6)
    if method.startswith("am"):
        assert losses[-1] < losses[0]
        return
    a, y, d = curvatures.numpy(), np.ones(3), None
    for step in range(6):
        assert losses[step] == pytest.approx(float((a * y * y).sum() / 2), rel=1e-12)
        g = a * y
        if method == "gd":
            y = y - lr * g
        elif method == "heavy_ball":
            d = g if d is None else beta * d + (1 - beta) * g
            y = y - lr * d
        else:
            d = g if d is None else beta * d + g
            y = y - lr * (1 - beta) * (g + beta * d)


def test_momentum_is_fixed_in_mid_run() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 4))
    groups = [{"params": [weight], "param_names": ["weight"], "weight_decay": 0.1}]
    optimizer = make_adamw(Method("am", 0.89), groups, 1e-2, 10)
    assert isinstance(optimizer, AMAdamW)
    for _ in range(3):
        weight.grad = torch.randn(8, 4)
        optimizer.step()
    memory = optimizer.state[weight]["exp_avg"].clone()
    fixed = fix_momentum(optimizer)
    weight.grad = torch.randn(8, 4)
    fixed.step()
    expected = 0.89 * memory + 0.11 * weight.grad
    torch.testing.assert_close(fixed.state[weight]["exp_avg"], expected)
    assert fixed.param_groups[0]["weight_decay"] == 0.1


@pytest.fixture
def tiny_recipe(tmp_path: Path, corpus_folder: Path) -> Path:
    import yaml

    recipe = yaml.safe_load(recipe_text(RECIPES / "configs" / "laptop.yaml"))
    recipe["model"] |= {"hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "num_layers": 1, "seq_len": 16}
    recipe["data"] |= {"source": str(corpus_folder), "val_rows": 4, "final_val_rows": 8, "val_batch_size": 4}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.slow
def test_a_pretraining_run(tiny_recipe: Path, tmp_path: Path) -> None:
    def result(method: Method, seed: int = 0, **more: int) -> Result:
        config = Scale(str(tiny_recipe), 12).config(method, 1e-2, seed, traces=method.kind == "am" and not more)
        return pretrain(str(tmp_path / "data"), config | more)

    am, adamw, again = result(Method("am", 0.89)), result(Method("adamw", 0.89)), result(Method("am", 0.89))
    assert am == again
    assert am["losses"][0] == adamw["losses"][0] != result(Method("adamw"), seed=1)["losses"][0]
    assert am["val_loss"] < am["losses"][0]
    betas = np.array(am["betas"])
    assert betas.shape == (12, len(am["names"]))
    assert (betas[1:] < 0.88).any()
    for method in (Method("radam"), Method("schedulefree"), Method("schedulefree", warmup=0.2)):
        assert result(method)["val_loss"] < 6
    in_parts = result(Method("am", 0.89), micro_batch_size=3)
    np.testing.assert_allclose(in_parts["losses"], am["losses"], atol=2e-3)
    late = result(Method("am", 0.89, am_until=0.5))
    assert late["losses"][:7] == am["losses"][:7]
    assert len(late["betas"]) == 6


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet18", 11.17), ("resnet50", 23.52), ("wide_resnet28x10", 36.48), ("vgg19", 20.04)]
)
def test_networks_have_their_papers_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        network = NETWORKS[name](3, 10)
        assert network(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """Write small files in the format of the Python archives of CIFAR-10 and CIFAR-100."""
    rng = np.random.default_rng(0)

    def write(name: str, labels: bytes, count: int) -> None:
        content = {
            b"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            labels: list(range(10)) * (count // 10),
        }
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(pickle.dumps(content))

    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        write(f"cifar-10-batches-py/{name}", b"labels", 10 if name == "test_batch" else 30)
    for name, count in (("train", 150), ("test", 10)):
        write(f"cifar-100-python/{name}", b"fine_labels", count)
    return tmp_path


def test_cifar_from_its_archive(cifar: Path) -> None:
    images = load_images("cifar10", cifar)
    assert images.train.shape == (150, 3, 32, 32)
    assert images.train.mean((0, 2, 3)) == pytest.approx([0, 0, 0], abs=1e-5)
    first, again, other = (next(images.batches(16, e, 0, torch.device("cpu")))[0] for e in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    fine = load_images("cifar100", cifar)
    assert fine.train.shape == (150, 3, 32, 32) and set(fine.train_labels.tolist()) == set(range(10))
    (cifar / "cifar-100-python" / "train").unlink()
    with pytest.raises(RecipeError, match="cifar-100-python/train is not there: unpack"):
        load_images("cifar100", cifar)


@pytest.mark.nightly("tasks of images")
@pytest.mark.slow
@pytest.mark.parametrize("task", sorted((STUDIES / "vision").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_trial_of_each_task_of_images(task: Path, cifar: Path, tmp_path: Path) -> None:
    """Each network trains on its data for a few steps of few images, with both optimizers."""
    small = tmp_path / task.name
    small.write_text(re.sub(r"batch_size: \d+", "batch_size: 4", task.read_text()))
    done = _run("vision", "--task", small, "--data-dir", cifar, "--try-steps", "3")
    errors = [float(error) for error in re.findall(r"'test_error': ([\d.]+)", done)]
    assert len(errors) == 2 and all(0 <= error <= 100 for error in errors), done


@pytest.mark.slow
def test_the_convex_study_in_small(tmp_path: Path) -> None:
    printed = _run("convex", "--out", tmp_path, "--steps", "3", "--workers", "2")
    assert printed.strip() == (tmp_path / "convex.md").read_text().strip()
    assert {path.name for path in tmp_path.glob("*.png")} == {"convex-curves.png", "convex-step-sizes.png"}


def _run(study: str, *args: object) -> str:
    """Run a study from a checkout, as docs/evidence.md does."""
    command = [PYTHON, "-m", f"recipes.studies.{study}", *map(str, args)]
    done = subprocess.run(command, cwd=RECIPES.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_warmup_page_grows_with_the_stages(tmp_path: Path) -> None:
    """The results are invented, because real ones take hours: every table and figure of every stage."""
    study, seen = Study(Ledger(tmp_path / "warmup.jsonl"), Scale(steps=80)), ""
    generator = np.random.default_rng(0)
    names = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]
    for stage in STAGES:
        for config in list(study.configs(stage)):
            noise = generator.normal(size=config["steps"]) / 100
            result: Result = {"val_loss": config["lr"] + noise[0], "losses": (2 + noise).tolist()}
            if config["traces"]:
                result |= {"names": names, "betas": generator.uniform(0.5, 0.89, (config["steps"], 3)).tolist()}
            if config not in study.ledger:
                study.ledger.add(config, result)
        page = report(study, tmp_path, "python -m recipes.studies.pretraining --steps 80")
        assert len(page) > len(seen) and page.startswith("# Warmup")
        seen = page
    assert seen == (tmp_path / "warmup.md").read_text()
    assert seen.count("\n## ") == 10
    pictures = set(re.findall(r"\]\((.*?)\)", seen))
    assert pictures == {path.name for path in tmp_path.glob("*.png")} and len(pictures) == 3
    assert "`python -m recipes.studies.pretraining --steps 80`: " in seen and f"torch {torch.__version__[:4]}" in seen


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("epochs:", "epoch:", "unexpected keyword argument 'epoch'"),
        ("batch_size: 64", "batch_size: 0", "batch_size is 0; allowed: a whole number >= 1"),
        ("network: resnet8", "network: vgg", "network is 'vgg'; allowed: resnet8 or resnet18"),
    ],
)
def test_a_wrong_task_of_images(old: str, new: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text((STUDIES / "vision" / "digits-resnet8.yaml").read_text().replace(old, new))
    with pytest.raises(RecipeError, match=words):
        read_task(path)
    with pytest.raises(RecipeError, match=r"--task .*absent\.yaml: .*No such file"):
        read_task(tmp_path / "absent.yaml")


def test_the_page_of_images(tmp_path: Path) -> None:
    """The results are invented: the least error is at the middle learning rate, AM's is one percent point lower."""
    sweep = sweep_of(Ledger(tmp_path / "vision.jsonl"), read_task(STUDIES / "vision" / "digits-resnet8.yaml"), "cpu")
    for stage in (sweep.sweep_configs, sweep.finalist_configs):
        for config in list(stage()):
            kind = config["method"]["kind"]
            off = abs(np.log(config["lr"] / (3e-3 if "adamw" in kind else 0.3)))
            ours = kind.startswith("am_")
            if config not in sweep.ledger:
                sweep.ledger.add(config, {"test_error": 5 + off - ours})
    task = read_task(STUDIES / "vision" / "digits-resnet8.yaml")
    page = vision_report(sweep, task, tmp_path, "python -m recipes.studies.vision")
    assert page == (tmp_path / "vision.md").read_text()
    assert (tmp_path / "vision-learning-rates.png").exists()
    assert "| AdamW 0.9     | -1.000 ± 0.000 (n=5) | -1.000 ± 0.000 (n=5)" in page


def test_the_two_planes_are_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "planes.png"
    subprocess.run([PYTHON, str(STUDIES / "two_planes.py"), str(picture)], check=True, env=dict(os.environ))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("token", [None, 35])
def test_a_bad_batch_is_the_same_each_time(token: int | None) -> None:
    batches = [torch.arange(80).reshape(2, 40) for _ in range(2)]
    for batch in batches:
        diagnoses.BadBatch(3, token).act(torch.nn.Identity(), batch)
    assert torch.equal(*batches)
    assert not torch.equal(batches[0], torch.arange(80).reshape(2, 40))
    values = set(batches[0].flatten().tolist())
    assert values == {token} if token else len(values) > 20 and values <= set(range(80))


@pytest.mark.slow
def test_faults_are_trained_and_drawn(tmp_path: Path, corpus_folder: Path) -> None:
    """With a tiny model, runs act on a block and on a batch; their sentences and pictures are made."""
    tiny = [f"--{key}={value}" for key, value in TINY.items() if "enable" not in key]
    arguments = ["--out", str(tmp_path), "--steps", "9", "--only", "dead", "bad-batch", *tiny]
    diagnoses.main([*arguments, f"--data.source={corpus_folder}"])
    dead, bad_batch = (tmp_path / "diagnoses.md").read_text().splitlines()[-2:]
    assert "layers.1 0.000 in step 4" in dead
    assert re.search(r"layers\.\d 0\.00\d in step 4", bad_batch)
    for name in ("dead", "bad-batch"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.mode == "P" and picture.width > 600
