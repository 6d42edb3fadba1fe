"""litgpt's own pretraining program with the optimizer by its path: steps, curves, and a bitwise resume."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.clients import block, client
from tests.python import COLD

pytestmark = [pytest.mark.nightly("clients"), pytest.mark.slow]
ROOT = Path(__file__).parents[2]
WORDS = ["<s>", "<unk>", *(f"w{number}" for number in range(30))]
MODEL = {"name": "tiny", "n_layer": 2, "n_embd": 16, "n_head": 2, "block_size": 16, "padded_vocab_size": len(WORDS)}
TRAIN = {"global_batch_size": 1, "micro_batch_size": 1, "max_seq_length": 16, "lr_warmup_steps": 1, "log_interval": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tokenizer and two texts; the first run splits and tokenizes them for the later ones."""
    client("litgpt")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder = tmp_path_factory.mktemp("litgpt")
    for name in ("tokenizer", "text"):
        (folder / name).mkdir()
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.save(str(folder / "tokenizer" / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    choice = random.Random(0).choice
    for name in ("a", "b"):  # it validates with the first
        (folder / "text" / f"{name}.txt").write_text(" ".join(choice(WORDS[2:]) for _ in range(400)))
    return folder


def pretrain(folder: Path, program: list[str], steps: int, *options: str) -> str:
    """Run the program and return its output."""
    sizes = {f"model_config.{key}": value for key, value in MODEL.items()}
    train = {f"train.{key}": value for key, value in TRAIN.items()} | {"train.max_tokens": 16 * steps}
    data = {"data": "TextFiles", "data.train_data_path": "text", "data.num_workers": 0, "tokenizer_dir": "tokenizer"}
    others = {"precision": "32-true", "devices": 1, "eval.max_iters": 1, "logger_name": "csv"}
    named = [word for key, value in (sizes | train | data | others).items() for word in (f"--{key}", str(value))]
    # litgpt compiles its model, for which torch needs a C++ compiler on a CPU.
    variables = {"PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [COLD, *program, "pythia-14m", *named, *options],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def rows(run: Path) -> list[dict[str, str]]:
    """Return what its last run has logged."""
    files = (run / "logs" / "csv").glob("version_*/metrics.csv")
    with max(files, key=lambda path: int(path.parent.name.partition("_")[2])).open() as file:
        return list(csv.DictReader(file))


def final(run: Path) -> dict[str, Any]:
    return torch.load(run / "final" / "lit_model.pth", weights_only=False)


def test_it_trains_and_resumes_to_the_bit(folder: Path) -> None:
    run = folder / "out"
    command = ("--out_dir", "out", "--optimizer", "am_lightning.AMAdamW", "--train.save_interval", "3")
    program = ["-m", "litgpt", "pretrain"]
    pretrain(folder, program, 6, *command)
    whole, logged = final(run), [row["loss"] for row in rows(run) if row["loss"]]
    state, (group,) = whole["optimizer"]["state"], whole["optimizer"]["param_groups"]
    assert whole["step_count"] == 6 and len(logged) == 6
    assert len(state) == len(group["params"]) == len(whole["model"])
    assert {float(one["step"]) for one in state.values()} == {6.0}
    assert group["beta1_max"] == 0.89 and sum(0 < float(one["beta"]) < 0.89 for one in state.values()) > len(state) / 4

    for name in ("final", "step-00000006"):
        shutil.rmtree(run / name)
    said = pretrain(folder, program, 6, *command, "--resume", "auto")
    assert "Resuming training from out/step-00000003/lit_model.pth" in said
    assert [(row["iter"], row["loss"]) for row in rows(run) if row["loss"]] == list(zip("456", logged[3:], strict=True))
    resumed = final(run)
    torch.testing.assert_close(resumed["model"], whole["model"], rtol=0, atol=0)
    torch.testing.assert_close(resumed["optimizer"]["state"], state, rtol=0, atol=0)


def test_a_copy_of_its_program_with_the_pages_line_logs_curves(folder: Path) -> None:
    """The optimizer's options are in YAML, as on the page."""
    source = Path(client("litgpt.pretrain").__file__).read_text()
    imported, attached = block("litgpt.md", "python").split("\n\n")
    before = "    optimizer = fabric.setup_optimizers(optimizer)\n"
    assert source.count(before) == 1
    changed = source.replace(before, f"{before}    {attached}\n").replace("import math\n", f"import math\n{imported}\n")
    (folder / "train.py").write_text(
        f"{changed}\n\nif __name__ == '__main__':\n    __import__('jsonargparse').CLI(setup)\n"
    )
    (folder / "optimizer.yaml").write_text(block("litgpt.md", "yaml"))
    pretrain(folder, ["train.py"], 50, "--config", "optimizer.yaml", "--out_dir", "curves")
    (group,) = final(folder / "curves")["optimizer"]["param_groups"]
    assert (group["beta1_max"], group["betas"][1], group["weight_decay"]) == (0.89, 0.95, 0.1)
    (curves,) = [row for row in rows(folder / "curves") if row.get("am/beta/mean")]
    assert curves["step"] == "50" and 0 < float(curves["am/beta/mean"]) <= 0.89
    found = {tag.removeprefix("am/beta/") for tag in curves if tag.startswith("am/beta/")} - {"mean", "min", "max"}
    assert found == {"attn.qkv", "attn.out", "mlp", "norm", "embed", "head"}
