"""am-lightning: list, cp, validate, fit; from the checkout and from a built wheel."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from am_lightning.pretrain.runtime.paths import recipe_files
from am_lightning.pretrain.runtime.recipe_text import recipe_text
from am_lightning.recipes.__main__ import main
from tests.python import COLD

from .commands import RECIPES, arguments

ROOT = RECIPES.parent
NAMES = sorted(recipe_files())


def tree(folder: Path) -> dict[str, bool]:
    """Return path -> whether it is executable."""
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder).as_posix(): os.access(path, os.X_OK) for path in files}


@pytest.mark.slow
def test_list_shows_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sorted(row[0] for row in rows[1:]) == NAMES
    assert ["60m", "58.2M", "1.31B", "256", "10000", "ddp"] in [row[:6] for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_validates(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", name, "--trainer.default_root_dir", str(tmp_path / "new" / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"OK: {recipe_files()[name]}"
    gated = ["tokenizer"] if name.startswith("llama-") else []
    assert [line.split()[0] for line in lines[1:]] == ["model", "step", "data", *gated, "folders"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("--data.batch_size 7 --trainer.devices 2", r"data.batch_size 7 is not divisible by 2 .* x 1"),
        (
            "--data.batch_size 8 --trainer.accumulate_grad_batches 3 --trainer.val_check_interval 3",
            r"data.batch_size 8 is not divisible by 1 .* x 3 .* = 3\.",
        ),
        ("--model.vocab_size 100", r"model.vocab_size is 100; allowed: >= 256"),
        ("--model.num_key_value_heads 3", r"model.num_key_value_heads is 3"),
        ("--model.optimizer.lr -1", r"model.optimizer: .*lr"),
        ("--model.optimizer torch.optim.SGD", r"model.optimizer: torch.optim.sgd.SGD is not exactly torch.optim.AdamW"),
        ("--trainer.strategy fsdp3", r"trainer.strategy is 'fsdp3'; allowed: one of .* Did you mean fsdp"),
        ("--data.source nowhere", r"data.source nowhere does not exist"),
        ("--data.tokenizer ./nowhere", r"data.tokenizer is './nowhere'; allowed: an existing folder"),
        ("--ckpt_path gone.ckpt", r"ckpt_path is 'gone.ckpt'"),
        ("--trainer.val_check_interval 5 --trainer.accumulate_grad_batches 2", r"trainer.val_check_interval is 5"),
        ("--trainer.default_root_dir /proc/version/run", r"trainer.default_root_dir is .*can be written"),
    ],
)
def test_what_does_not_fit_is_named(settings: str, says: str) -> None:
    with pytest.raises(SystemExit, match=says) as caught:
        main(["validate", "laptop", *settings.split()])
    assert str(caught.value).startswith("error: ")


def test_a_typing_error_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="Did you mean laptop"):
        main(["validate", "lapto"])
    with pytest.raises(SystemExit) as caught:
        main(["validate", "laptop", "--trainer.max_step", "3"])
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert "trainer.max_step" in errors
    assert len(errors.splitlines()) < 8


def test_cp_copies_what_a_run_needs_and_overwrites_nothing(tmp_path: Path) -> None:
    copy = tmp_path / "a copy"
    assert main(["cp", "60m", str(copy)]) == 0
    made = tree(copy)
    programs = {"pretrain.py", "pretrain_accelerate.py", "pretrain_hf_trainer.py", "prepare_data.py"}
    assert {name for name in made if "/" not in name} == {"60m.yaml", *programs}
    launchers = {f"launch/{name}": executable for name, executable in tree(RECIPES / "launch").items()}
    assert {name: bit for name, bit in made.items() if name.startswith("launch/")} == launchers
    assert made["launch/torchrun.sh"]
    assert {name for name in made if name.startswith("configs/")} == {
        f"configs/deepspeed/zero{n}.json" for n in (1, 2, 3)
    }

    assert main(["cp", "60m", str(copy)]) == 0  # the same files: nothing to lose
    mine = "# mine\n" + (copy / "60m.yaml").read_text()
    (copy / "60m.yaml").write_text(mine)
    (copy / "pretrain.py").unlink()
    with pytest.raises(SystemExit, match=r"60m.yaml: exists already.*--force"):
        main(["cp", "60m", str(copy)])
    assert (copy / "60m.yaml").read_text() == mine
    assert not (copy / "pretrain.py").exists()
    assert main(["cp", "60m", str(copy), "--force"]) == 0
    assert (copy / "60m.yaml").read_text() == recipe_text(RECIPES / "configs" / "60m.yaml")
    with pytest.raises(SystemExit, match="Did you mean 60m"):
        main(["cp", "60n", str(copy)])


def test_cp_writes_nothing_through_a_link(tmp_path: Path) -> None:
    """cp follows no link to a file, whether the file exists or not, and no link to a folder."""
    copy, outside = tmp_path / "copy", tmp_path / "outside"
    copy.mkdir()
    outside.mkdir()
    (outside / "precious").write_text("mine")
    (copy / "pretrain.py").symlink_to(outside / "precious")
    (copy / "60m.yaml").symlink_to(outside / "dangling")
    with pytest.raises(SystemExit):
        main(["cp", "60m", str(copy)])
    assert main(["cp", "60m", str(copy), "--force"]) == 0
    assert not (copy / "pretrain.py").is_symlink()
    (copy / "launch").rename(tmp_path / "launch")
    (copy / "launch").symlink_to(outside)
    with pytest.raises(SystemExit, match=r"launch is a link, and cp writes only into DIR"):
        main(["cp", "60m", str(copy), "--force"])
    assert [path.name for path in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_text() == "mine"


def test_an_edited_copy_is_meant_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cp", "60m", str(tmp_path / "copy")]) == 0
    monkeypatch.chdir(tmp_path / "copy")
    recipe = Path("60m.yaml")
    recipe.write_text(recipe.read_text().replace("max_steps: 10000", "max_steps: 77"))
    capsys.readouterr()
    assert main(["validate", "60m"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("OK: 60m.yaml\n") and "; 77 steps" in out


def test_validate_says_which_library_the_data_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["validate", "60m", "--trainer.default_root_dir", str(tmp_path)]
    assert main(command) == 0
    assert "datasets library" not in capsys.readouterr().out
    monkeypatch.setattr("am_lightning.pretrain.commands.checks.find_spec", lambda name: None)
    assert main(command) == 0
    assert "needs the datasets library, which is not installed here: pip install" in capsys.readouterr().out


def test_a_gated_tokenizer_is_named_before_it_is_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """validate and plan name a gated tokenizer with or without HF_TOKEN, and do not name an open one."""
    root = ["--trainer.default_root_dir", str(tmp_path)]
    for command in (["validate", "llama-8b", "--trainer.strategy", "auto", *root], ["plan", "llama-8b", "--gpus", "8"]):
        assert main(command) == 0
        text = capsys.readouterr().out
        assert "meta-llama/Meta-Llama-3-8B is gated: accept its licence" in text and "HF_TOKEN" in text
        assert main([*command, "--data.tokenizer", "t5-base"]) == 0
        assert " is gated" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("words", ["list", "--help", "--version", "plan --help", "fit --help"])
def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path, words: str) -> None:
    """In `list | head -1` the reader leaves early."""
    command = [COLD, "-m", "am_lightning.recipes", *words.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert "Traceback" not in errors and "BrokenPipe" not in errors
    assert process.wait(timeout=60) == (0 if words == "plan --help" else 1), "argparse ignores it"


def test_fit_takes_a_name_and_needs_no_tensorboard(
    tmp_path: Path, corpus_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`fit NAME` needs no file of that name, and a run without event files ends with a summary without curves."""
    [_, _, _, *settings] = arguments(tmp_path / "run", corpus_folder, 2)
    logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", str(tmp_path)]
    assert main(["fit", "laptop", *settings, *logger]) == 0
    assert (tmp_path / "run" / "checkpoints" / "step-000002.ckpt").exists()
    heads = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert heads == ["validation loss", "training", "checkpoint", "next"]


@pytest.mark.slow
def test_a_built_wheel_has_it_all(tmp_path: Path, corpus_folder: Path) -> None:
    """Without the checkout the wheel lists and copies recipes, and the copy trains by launch/torchrun.sh."""
    build = [COLD, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = (tmp_path / "dist").iterdir()
    site = tmp_path / "site"
    install = [COLD, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, timeout=240)
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "PYTHON": COLD}

    def run(*command: str, **variables: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env={**env, **variables}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    module = [COLD, "-m", "am_lightning.recipes"]
    console = site / "bin" / "am-lightning"
    assert run(COLD, str(console), "list") == run(*module, "list")
    launched = ["fit", "laptop", "--gpus", "1", *arguments(tmp_path / "fit", corpus_folder, 2)[3:]]
    position = launched.index("--trainer.devices")
    assert "CPU processes" in run(COLD, str(console), *launched[:position], *launched[position + 2 :])
    assert (tmp_path / "fit" / "checkpoints" / "step-000002.ckpt").exists()
    assert str(site) in run(*module, "validate", "laptop", "--data.source", str(corpus_folder)).splitlines()[0]
    assert "cd copy" in run(*module, "cp", "laptop", "copy")
    settings = arguments(tmp_path / "run", corpus_folder, 2)[3:]
    sizes = {"NODES": "1", "GPUS_PER_NODE": "1", "CONFIG": "copy/laptop.yaml", "RUN_DIR": str(tmp_path / "run")}
    out = run(str(tmp_path / "copy" / "launch" / "torchrun.sh"), *settings, **sizes)
    assert "validation loss" in out
    expected = {name: mode for name, mode in tree(RECIPES).items() if not name.startswith("studies/")}
    assert tree(site / "am_lightning" / "recipes" / "files") == expected
