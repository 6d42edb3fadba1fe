"""The 60m recipe for two steps on two processes, from a local parquet and a local tokenizer, through five programs."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from am_lightning.recipes.__main__ import main

from .entry_points import ENTRY_POINTS, curve_of, launch
from .test_entry_points import needs_compiler

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.slow
NIGHTLY = pytest.mark.nightly("programs and engines")

STEPS = 2


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the recipe's own model with few short rows of local documents."""
    folder = tmp_path_factory.mktemp("local")
    rng = random.Random(0)
    words = ["memory", "momentum", "step", "gradient", "the", "of", "is", "learned"]
    documents = [" ".join(rng.choices(words, k=120)) for _ in range(300)]
    (folder / "text").mkdir()
    pq.write_table(pa.table({"text": documents}), folder / "text" / "part.parquet", row_group_size=50)
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(documents, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder / "tokenizer")
    values = {
        "model.seq_len": 32,
        "data.source": folder / "text",
        "data.source_options": "null",
        "data.tokenizer": folder / "tokenizer",
        "data.val_percent": 10,
        "data.batch_size": 4,
        "data.val_rows": 4,
        "data.final_val_rows": 4,
        "data.val_batch_size": 2,
        "trainer.max_steps": STEPS,
        "trainer.log_every_n_steps": 1,
        "trainer.val_check_interval": STEPS,
        "trainer.precision": "32-true",
    }
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def test_it_validates(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "60m", *settings, "--trainer.devices", "2"]) == 0
    out = capsys.readouterr().out
    assert "58.2M parameters" in out
    assert "tokens)" in out  # the tokenizer was checked


@pytest.mark.parametrize(
    "name",
    [
        "Lightning DDP",
        pytest.param("Lightning FSDP2", marks=NIGHTLY),
        pytest.param("Accelerate DDP", marks=NIGHTLY),
        pytest.param("Lightning DeepSpeed", marks=[needs_compiler, NIGHTLY]),
        pytest.param("Accelerate DeepSpeed", marks=[needs_compiler, NIGHTLY]),
    ],
)
def test_it_trains(name: str, settings: list[str], tmp_path: Path) -> None:
    entry, root = ENTRY_POINTS[name], tmp_path / "run"
    done = launch(entry, "60m", root, settings)
    shutil.rmtree(root / "checkpoints", ignore_errors=True)  # 0.7 GB
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    curve = curve_of(entry, root)
    assert list(curve) == [1, 2]
    first, second = (curve[step][0] for step in curve)
    assert first == pytest.approx(10.4, abs=0.3)  # about log(32100), of the untrained model, for every program
    assert second < first - 0.2
