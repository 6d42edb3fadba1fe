"""am-lightning: help and refusals without the imports of training, settings' names, processes that `fit` starts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Optional, Union

import pytest
import yaml

from am_lightning.pretrain.commands import fit
from am_lightning.pretrain.runtime.cli import PretrainParser
from am_lightning.pretrain.runtime.errors import RecipeError, UsageError
from am_lightning.pretrain.runtime.main import command_line
from am_lightning.pretrain.runtime.run_config import read_run_config
from am_lightning.pretrain.runtime.settings import check_settings, setting_types, wrong_type
from am_lightning.recipes.__main__ import _COMMANDS, main
from tests.python import COLD, PYTHON

from .commands import RECIPES, arguments

HEAVY = ["torch", "lightning", "transformers", "numpy", "matplotlib", "datasets", "deepspeed"]
# Arguments, exit status, and a part of the output.
LIGHT = [
    ([], 0, "COMMAND --help"),
    (["--help"], 0, "am-lightning COMMAND"),
    (["--version"], 0, "am-lightning "),
    (["list"], 0, "58.2M"),
    (["cp", "60m", "copy"], 0, "launch/torchrun.sh"),
    *[([name, "--help"], 0, "usage: ") for name in _COMMANDS if name != "bench"],
    (["lst"], 2, "no command lst. Did you mean list?"),
    (["cp", "60n", "copy"], 1, "Did you mean 60m?"),
    (["fit"], 1, "the NAME of a recipe"),
    (["fit", "lapto"], 1, "Did you mean laptop?"),
    (["fit", "laptop", "--trainer.max_step", "3"], 2, "no setting trainer.max_step. Did you mean trainer.max_steps?"),
    (["validate", "laptop", "--learning_rate=3"], 2, "Did you mean model.optimizer.lr?"),
    (["plan", "laptop", "--gpus", "8", "--batch_size", "3"], 2, "Did you mean data.batch_size?"),
    (
        ["fit", "--config", "mine.yaml"],
        2,
        "no setting model.hiden_size. Did you mean model.hidden_size? (mine.yaml, line 2)",
    ),
    (["validate", "circle.yaml"], 1, "form a circle: circle.yaml -> other.yaml -> circle.yaml"),
    (["cp", "60m", "mine.yaml"], 1, "DIR is 'mine.yaml'; allowed: a folder (mine.yaml is a file)"),
    (["cp", "60m", "mine.yaml/new"], 1, "allowed: a folder (mine.yaml is a file)"),
    (["validate", "empty.yaml"], 2, "empty.yaml is not a recipe: it holds nothing; allowed: sections (model, data"),
    (["validate", "list.yaml"], 2, "list.yaml: model is [1, 2]; allowed: settings"),
    (["fit", "laptop", "60m"], 2, "unrecognized argument '60m' after laptop"),
    (["fit", "laptop", "--gpus", "0"], 1, "--gpus is 0; allowed: a whole number >= 1"),
    (["plan", "60m", "--gpus", "8", "--gpu", "K80"], 1, "--gpu is 'K80'; allowed: one of A100-40"),
    (["plan", "60m", "--gpus", "8", "--gpus-per-node", "0"], 1, "--gpus-per-node is 0; allowed: a whole number"),
    (["sample", "missing", "--prompt", "a"], 1, "RUN is 'missing': there is no such file or folder; allowed: the fol"),
    (["export", "missing", "hf"], 1, "RUN is 'missing': there is no such file or folder; allowed: the folder of a"),
    (["validate", "laptop", "--trainer.max_steps", "abc"], 2, "error: trainer.max_steps is 'abc'; allowed: int\n"),
    (["fit", "wrong.yaml"], 2, "checkpoint.keep is 1.5; allowed: int or null (wrong.yaml, line 3)"),
    (["fit", "latin1.yaml"], 1, "latin1.yaml is not a recipe: its bytes are not UTF-8"),
]
FILES = {
    "mine.yaml": b"model:\n  hiden_size: 3\n",
    "circle.yaml": b"# base: other.yaml\n",
    "other.yaml": b"# base: circle.yaml\n",
    "empty.yaml": b"",
    "list.yaml": b"model: [1, 2]\n",
    "wrong.yaml": b"trainer: {max_steps: 0x10}\ncheckpoint:\n  keep: 1.5\n",
    "latin1.yaml": b"data: {source: t\xe4xte}\n",
}

PROBE = """
import contextlib, io, json, sys
from am_lightning.recipes.__main__ import main
sys.argv = ["am-lightning"]
for words in json.loads(sys.argv_words):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            status = main(words)
        except SystemExit as stopped:
            status = stopped.code or 0
            if isinstance(status, str):
                print(status)
                status = 1
    loaded = [name for name in HEAVY if name in sys.modules]
    print(json.dumps([status, text.getvalue(), loaded]))
"""


def test_help_and_refusals_import_nothing_of_training(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    words = json.dumps([words for words, _, _ in LIGHT])
    code = f"import sys\nsys.argv_words = {words!r}\nHEAVY = {HEAVY!r}\n{PROBE}"
    done = subprocess.run([COLD, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(LIGHT), done.stderr
    for (given, status, says), (found, text, loaded) in zip(LIGHT, results, strict=True):
        assert found == status, (given, text)
        assert says in text, (given, text)
        assert loaded == [], given


def test_an_output_on_a_full_disk_is_no_lost_run(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [COLD, "-m", "am_lightning.recipes", "list"]
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "error: cannot write the output: No space left on device. Free some space.\n"


def test_the_short_help_has_the_values_of_base_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    base = yaml.safe_load((RECIPES / "configs" / "base.yaml").read_text())
    assert fit.main(["--help"]) == 0
    _, _, usual = capsys.readouterr().out.partition("Usual settings")
    found = re.findall(r"^  --([\w.]+) (.*?)  +(\w.*|\W\w.*)$", usual, re.MULTILINE)
    assert [key for key, _, _ in found] == list(fit._USUAL)
    for key, value, _ in found:
        expected = base
        for part in key.replace("optimizer.", "optimizer.init_args.").split("."):
            expected = expected[part]
        assert yaml.safe_load(value) == expected, key


def test_bench_takes_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    """bench has its own parser and imports torch, so it is not among the arguments above."""
    small = ["--model", "tensors:2x10", "--repeats", "1", "--tokens", "0", "--only", "foreach", "--json"]
    assert main(["bench", *small]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["tensors"], report["elements"]) == (2, 20)


def test_the_names_are_those_of_the_parser() -> None:
    """The names are read from source files and must equal those that the parser of `fit` accepts."""
    config = read_run_config(["--config", str(RECIPES / "configs" / "laptop.yaml")]).config
    inside = {f"{section}.{key}" for section, keys in config.items() if isinstance(keys, dict) for key in keys}
    known = {name for name in setting_types() if name.count(".") < 2 and name != "model.optimizer"}
    assert known - {"config", "help", "print_config", "verbose"} == {*config, *inside} - {"model.optimizer"}
    assert "model.optimizer.betas" in setting_types()


def test_right_names_pass() -> None:
    check_settings(["laptop", "--trainer.callbacks+=x", "--model.optimizer.lr", "1", "--data", "x.yaml", "--threads=2"])
    check_settings(["laptop", "--model.optimizer=torch.optim.Adafactor", "--model.optimizer.eps=[null, 0.001]"])
    check_settings([])
    check_settings(["--config", "laptop", "--config=60m", "--ckpt_path", "last", "--seed_everything", "-3"])
    with pytest.raises(UsageError, match=r"there is no setting tainer. Did you mean trainer\?"):
        check_settings(["laptop", "--tainer", "x.yaml"])


NUMBERS = ["3", "-3", "1_000", "0x10", "1:30", "3.0", "1e3", "1e-3", "-.5", ".inf", "1e400", "'3'", "3 # c", "!!int 3"]
OTHERS = ["true", "Yes", "off", "n", "null", "~", "''", "abc", "0o17", "1e", "[1]", "[1", "{a: 1}", "2020-01-01"]


@pytest.mark.parametrize(
    "kind", ["int", "float", "bool", "str", "int | None", "Optional[Union[int, float]]", "int | str", "list[int]"]
)
def test_no_value_that_the_parser_accepts_is_refused(kind: str, tmp_path: Path) -> None:
    parser = PretrainParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--a.b", type=eval(kind, {"Optional": Optional, "Union": Union}))
    path, refused = tmp_path / "a.yaml", 0
    for text in NUMBERS + OTHERS:
        path.write_text(f"a:\n  b: {text}\n")
        with contextlib.suppress(yaml.YAMLError):
            assert accepts(parser, f"--config={path}") <= (
                not wrong_type(yaml.safe_load(path.read_text())["a"]["b"], kind)
            )
        refuses = bool(wrong_type(text, kind))
        assert accepts(parser, f"--a.b={text}") <= (not refuses), text
        refused += refuses
    assert (refused > 5) == ("str" not in kind and "list" not in kind)


def accepts(parser: PretrainParser, word: str) -> bool:
    try:
        parser.parse_args([word])
    except RecipeError:
        return False
    return True


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--gpus 0", "--gpus is 0; allowed"),
        ("--nodes 0", "--nodes is 0; allowed"),
        ("--gpus 2 --master-port 70000", "--master-port is 70000; allowed: 1 to 65535"),
        ("--gpus 2 --trainer.devices 4", "--trainer.devices is '4'; allowed: no value beside --gpus"),
        ("--master-addr node0", "give --nodes M"),
    ],
)
def test_processes_that_cannot_be_are_refused(words: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        fit.main(["laptop", *words.split()])


def test_the_other_machines_command_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: dict[str, str] = {}
    monkeypatch.setattr(os, "execvpe", lambda program, args, environment: seen.update(environment, args=" ".join(args)))
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("# base: /nowhere\n".replace("/nowhere", str(RECIPES / "configs" / "laptop.yaml")))
    with pytest.raises(TypeError):  # execvpe returned
        int(fit.main(["mine.yaml", "--gpus", "3", "--nodes", "2", "--model.optimizer.lr", "1e-3"]))  # type: ignore[call-overload]
    first = dict(seen)
    with pytest.raises(TypeError):
        int(fit.main(["laptop", "--gpus", "3"]))  # type: ignore[call-overload]
    assert seen["args"].endswith("torchrun.sh --ckpt_path null") and seen["NODES"] == "1"
    resumed = "ckpt_path: last\ntrainer: {default_root_dir: my}\n"
    Path("resumed.yaml").write_text(Path("mine.yaml").read_text() + resumed)
    for words, ckpt_path, restarts in (
        (["laptop", "--ckpt_path", "a.ckpt"], "a.ckpt", "0"),
        (["resumed.yaml", "--ckpt_path", "null"], "null", "0"),
        (["resumed.yaml"], "last", None),
    ):
        seen.clear()
        with pytest.raises(TypeError):
            int(fit.main([*words, "--gpus", "3"]))  # type: ignore[call-overload]
        assert f"--ckpt_path {ckpt_path}" in seen["args"] and seen.get("MAX_RESTARTS") == restarts
    assert seen["RUN_DIR"] == "my"  # although no blank line follows the line `# base:`
    seen = first
    assert {key: seen[key] for key in ("NODES", "GPUS_PER_NODE", "MASTER_ADDR")} == {
        "NODES": "2",
        "GPUS_PER_NODE": "3",
        "MASTER_ADDR": "node0",
    }
    assert Path(seen["CONFIG"]) == tmp_path / "mine.yaml" and seen["RUN_DIR"] == "runs/laptop"
    assert seen["args"].endswith("launch/torchrun.sh --ckpt_path null --model.optimizer.lr 1e-3")
    assert seen["MAX_RESTARTS"] == "0"
    again = "am-lightning fit mine.yaml --gpus 3 --nodes 2 --model.optimizer.lr 1e-3 --master-addr node0"
    assert again in capsys.readouterr().out


def test_fit_starts_processes_and_resumes(tmp_path: Path, corpus_folder: Path) -> None:
    def train(steps: int) -> str:
        settings = arguments(tmp_path / "run", corpus_folder, steps)[3:]
        position = settings.index("--trainer.devices")
        words = ["fit", "laptop", "--gpus", "2", "--ckpt_path", "last", *settings[:position], *settings[position + 2 :]]
        command = [PYTHON, "-m", "am_lightning.recipes", *words]
        environment = {**os.environ, "PYTHONPATH": str(RECIPES.parent)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    text = train(2)
    assert "1 x 2 CPU processes" in text and "MEMBER: 2/2" in text
    train(4)
    steps = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*.ckpt")}
    assert "step-000004.ckpt" in steps and not (tmp_path / "run" / "earlier").exists()


def test_a_launcher_of_a_copy_takes_the_copied_recipe(tmp_path: Path) -> None:
    assert main(["cp", "60m", str(tmp_path / "copy")]) == 0
    (tmp_path / "show.py").write_text("import sys\nprint(sys.argv[1:])\n")
    launcher = str(tmp_path / "copy" / "launch" / "torchrun.sh")
    environment = {
        **os.environ,
        "PYTHON": PYTHON,
        "GPUS_PER_NODE": "1",
        "PROGRAM": str(tmp_path / "show.py"),
        "CONFIG": "",
    }

    def launch(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        env = {**environment, "PYTHONPATH": str(RECIPES.parent), **variables}
        return subprocess.run([launcher, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    done = launch()
    assert done.returncode == 0 and str(tmp_path / "copy" / "60m.yaml") in done.stdout, done.stderr
    for words, variables, says in (
        (["--trainer.max_step", "3"], {}, "Did you mean trainer.max_steps?"),
        ([], {"CONFIG": "laptopp"}, "Did you mean laptop?"),
    ):
        done = launch(*words, **variables)
        assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
    (tmp_path / "copy" / "mine.yaml").write_text("{}\n")
    done = launch()
    assert done.returncode == 2 and "holds several: 60m.yaml mine.yaml" in done.stderr


@pytest.mark.parametrize(("kind", "status"), [(RecipeError, 1), (UsageError, 2)])
def test_ranks_print_an_error_about_any_path_once(
    kind: type[RecipeError],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The file's name has a byte that is no UTF-8; torchrun sets the variables."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    for rank in "01":
        (tmp_path / rank).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        with pytest.raises(SystemExit) as end, command_line(imports=False):
            raise kind("cannot read \udcff.txt")
        assert end.value.code == status
    [line] = capfd.readouterr().err.splitlines()  # pytest's stderr replaces the byte
    assert line.startswith("error: cannot read ") and line.endswith(".txt")
