"""The programs' messages for a misspelt key, an unknown name, or a folder that refuses."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pretrain_accelerate
import pretrain_hf_trainer
import pytest
from matplotlib.figure import Figure

from am_lightning.pretrain.commands.report.plot import save
from am_lightning.pretrain.data.shards import Index, write_index
from am_lightning.pretrain.data.tokenizer import load_named
from am_lightning.pretrain.runtime import main
from am_lightning.pretrain.runtime.atomic_files import write_failure
from am_lightning.pretrain.runtime.cli import PretrainCLI
from am_lightning.pretrain.runtime.errors import RecipeError, UsageError
from am_lightning.pretrain.runtime.paths import recipes_folder
from am_lightning.pretrain.runtime.run_config import RunConfig, read_run_config
from tests.python import PYTHON

from .commands import RECIPES, arguments


@pytest.fixture
def copy(tmp_path: Path) -> Any:
    """Write a YAML over laptop's."""
    for name in ("base.yaml", "laptop.yaml"):
        (tmp_path / name).write_bytes((recipes_folder() / "configs" / name).read_bytes())

    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(f"# base: laptop.yaml\n{text}")
        return path

    return write


@pytest.mark.parametrize(
    ("text", "said", "line"),
    [
        ("trainer:\n  max_stepz: 3\n", "there is no setting trainer.max_stepz. Did you mean trainer.max_steps?", 3),
        ("modle:\n  hidden_size: 3\n", "there is no setting modle. Did you mean model?", 2),
        (
            "model:\n  optimizer:\n    init_args:\n      learning_rate: 3\n",
            "model.optimizer.init_args.learning_rate: AMAdamW has no argument of that name. Did you mean lr?",
            5,
        ),
        (
            "model:\n  optimizer:\n    init_args:\n      weight_decai: 3\n",
            "model.optimizer.init_args.weight_decai: AMAdamW has no argument of that name. Did you mean weight_decay?",
            5,
        ),
        (
            "trainer:\n  callbacks:\n  - class_path: am_lightning.AdaptiveMemory\n    init_args:\n      lambdd: 3\n",
            "trainer.callbacks.init_args.lambdd: AdaptiveMemory has no argument of that name. Did you mean lambd?",
            6,
        ),
    ],
)
def test_a_misspelt_key_of_a_yaml(copy: Any, text: str, said: str, line: int) -> None:
    path = copy(text)
    with pytest.raises(UsageError) as raised:
        read_run_config(["--config", str(path)])
    assert str(raised.value) == f"{said} ({path}, line {line})"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.max_step", "3"], "trainer.max_step. Did you mean trainer.max_steps?"),
        (["--data.batchsize=3"], "data.batchsize. Did you mean data.batch_size?"),
        (["--entirely.other", "3"], "entirely.other"),
    ],
)
def test_a_misspelt_key_of_the_command_line(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "fit", "--config", "laptop", *words])
    with pytest.raises(UsageError) as raised:
        PretrainCLI()
    assert str(raised.value) == f"there is no setting {said}"


@pytest.mark.parametrize(
    "refuses", [pretrain_accelerate.make_accelerator, pretrain_hf_trainer.training_arguments], ids=["accelerate", "hf"]
)
def test_a_precision_that_a_program_does_not_have(refuses: Callable[[RunConfig], object]) -> None:
    settings = read_run_config(["--config", "laptop", "--trainer.precision", "bf16-true"])
    with pytest.raises(RecipeError, match=r"trainer.precision is 'bf16-true'; allowed: 32-true or bf16-mixed or 16-m"):
        refuses(settings)


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.EROFS, "Choose a folder that this user may write to"),
        (errno.EACCES, "Choose a folder that this user may write to"),
        (errno.ENAMETOOLONG, "Choose a shorter name"),
        (errno.ENOTDIR, "Choose another folder"),
        (errno.ENOSPC, "Free some space"),
    ],
)
def test_the_cure_is_that_of_the_reason(tmp_path: Path, number: int, cure: str) -> None:
    text = str(write_failure(tmp_path / "a", OSError(number, os.strerror(number)), "Free some space."))
    assert text.startswith(f"cannot write {tmp_path / 'a'}: {os.strerror(number)}") and cure in text


def test_the_cure_names_the_option_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"Choose another folder \(am-lightning report --output FILE\)\.$"):
        save(Figure(), tmp_path / "file" / "report.png")
    with pytest.raises(RecipeError, match=r"Choose another folder \(--data\.cache_dir DIR\)\.$"):
        write_index(tmp_path / "file" / "index.json", Index(2, "uint8", 256, "bytes", "", "text", 5.0, {}, (), ()))


@pytest.mark.parametrize("name", ["./tok", "../tok", "/tok", "~/tok"])
def test_a_tokenizer_that_is_a_missing_folder(name: str) -> None:
    with pytest.raises(RecipeError, match=r"data.tokenizer is '.*tok'; allowed: an existing folder"):
        load_named(name)


def test_a_port_in_use() -> None:
    with (
        pytest.raises(SystemExit, match=r"address already in use.*\. Another run uses this port: give another MASTER_"),
        main.command_line(),
    ):
        raise RuntimeError("The server socket has failed ... (errno: 98 - address already in use), EADDRINUSE")


@pytest.mark.slow
def test_a_run_whose_output_is_closed_ends_as_usual(tmp_path: Path, corpus_folder: Path) -> None:
    words = " ".join([PYTHON, str(RECIPES / "pretrain.py"), *arguments(tmp_path / "a", corpus_folder, 2)])
    fit = "" if " fit " in words else " fit"
    program = str(RECIPES / "pretrain.py")
    command = words.replace(program, f"{program}{fit}")
    result = subprocess.run(["bash", "-c", f"{command} >&-"], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("fit", "laptop", "--trainer.default_root_dir", "käse"), "the argument 'k\\udcc3\\udca4se': this locale"),
        (("report", "käse"), "the argument 'k\\udcc3\\udca4se': this locale has no such letters; set LC_ALL=C.UTF-8"),
        (("fit", "umlaut.yaml"), "umlaut.yaml has letters that this locale ("),
        (("fit", "escaped.yaml"), "data.source 'k\\xe4se': this locale has no such letters; set LC_ALL=C.UTF-8"),
    ],
    ids=["folder", "run", "yaml", "source"],
)
def test_letters_that_the_locale_lacks(words: tuple[str, ...], wanted: str, tmp_path: Path) -> None:
    base = recipes_folder() / "configs" / "laptop.yaml"
    (tmp_path / "umlaut.yaml").write_text(f"# base: {base}\ndata: {{source: käse}}\n", encoding="utf-8")
    (tmp_path / "escaped.yaml").write_text(f'# base: {base}\ndata: {{source: "k\\u00e4se"}}\n', encoding="ascii")
    poor = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [PYTHON, "-m", "am_lightning.recipes", *words]
    done = subprocess.run(command, cwd=tmp_path, env=poor, capture_output=True, timeout=240)
    assert done.returncode == 1 and wanted in done.stderr.decode().splitlines()[-1], done.stderr.decode()
    assert not (tmp_path / "runs").exists()
