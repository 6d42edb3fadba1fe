"""A hub that does not answer: the programs end with one line, and the cache is used."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.python import COLD

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu"]


class Silent:
    """A server that accepts connections and sends nothing."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        while True:
            try:
                self.connections.append(self.socket.accept()[0])
            except OSError:
                return

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a program that uses this hub, with an empty cache and a timeout of a second."""
        address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_CACHE")
        inherited = {key: value for key, value in os.environ.items() if key not in names}
        return inherited | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_ETAG_TIMEOUT": "1", "PYTHON": COLD}


@pytest.fixture
def silent() -> Iterator[Silent]:
    server = Silent()
    yield server
    server.socket.close()
    for each in server.connections:
        each.close()


def _run(command: list[str], env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    env["PYTHONPATH"] = str(ROOT)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


ALL = """
import contextlib, io, tokenizers, transformers
from pathlib import Path
from am_lightning.pretrain.data.chunks import load_hub
from am_lightning.pretrain.data.tokenizer import load_named
from am_lightning.recipes.__main__ import main

for command in (["validate", "60m", "--trainer.default_root_dir", "run"], ["plan", "60m", "--gpus", "8"]):
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(command) == 0
print("asked nobody", flush=True)
input()
for load in (lambda: load_named("some/other"), lambda: load_hub("some/texts", "{}")):
    try:
        load()
    except Exception as error:
        print(type(error).__name__, error)
backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"memory": 0, "</s>": 1}, unk_token="</s>"))
made = Path("hub/models--some--tokenizer/snapshots/0000000000000000000000000000000000000000")
transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(made)
made.joinpath("config.json").write_text('{"model_type": "t5"}')  # transformers looks for this file, too
made.parents[1].joinpath("refs").mkdir()
made.parents[1].joinpath("refs/main").write_text(made.name)
print("vocabulary", load_named("some/tokenizer").vocab_size)
"""


@pytest.mark.slow
def test_a_silent_hub_is_asked_once(silent: Silent, tmp_path: Path) -> None:
    """validate and plan do not ask; a missing tokenizer gives one line; one in the cache is used."""
    pytest.importorskip("datasets")
    env = silent.environment(tmp_path) | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([COLD, "-c", ALL], cwd=tmp_path, env=env, text=True, **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == "asked nobody\n" and silent.connections == []
    out, err = process.communicate("\n", timeout=120)
    assert process.returncode == 0, err
    tokenizer, texts, vocabulary = out.splitlines()
    lacks = "is missing or incomplete in this machine's cache, and http://127.0.0.1:"
    assert tokenizer.startswith(f"RecipeError data.tokenizer some/other {lacks}"), tokenizer
    assert texts.startswith(f"RecipeError data.source hf:some/texts {lacks}"), texts
    assert vocabulary == "vocabulary 2"
    assert len(silent.connections) == 1


@pytest.mark.slow
def test_every_rank_ends_where_the_hub_is_silent(silent: Silent, corpus_folder: Path, tmp_path: Path) -> None:
    launch = [COLD, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    settings = ["--data.source", str(corpus_folder), "--data.tokenizer", "some/tokenizer", "--trainer.devices", "2"]
    root = ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.strategy", "ddp"]
    program = [str(ROOT / "recipes" / "pretrain.py"), "fit", "--config", "laptop"]
    done = _run([*launch, *program, *settings, *root, *TINY], silent.environment(tmp_path), tmp_path)
    assert done.returncode == 1
    assert "error: data.tokenizer some/tokenizer is missing or incomplete in this machine's cache" in done.stderr, (
        done.stderr
    )
