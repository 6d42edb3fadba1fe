"""Every Python block of README and of the pages runs unchanged, after the lines that its reader has already."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.ports import free_port

from .programs import ROOT, run_python

TORCH = (
    "import torch\nmodel = net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))\n"
)
LIGHTNING = "import lightning as L\n"
STEPPED = (
    TORCH + "from am_lightning import AMAdamW, clip_grad_norm_\n"
    "optimizer = AMAdamW(model.named_parameters())\nmodel(torch.ones(2, 8)).sum().backward()\noptimizer.step()\n"
)
LLAMA = """\
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                     num_attention_heads=2))
rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(4)]
dataset, loader = rows, torch.utils.data.DataLoader(rows, 2)
args = TrainingArguments("out", use_cpu=True, max_steps=2, report_to="tensorboard")
"""
ACCELERATED = (
    TORCH + "from accelerate import Accelerator\nfrom am_lightning import am_adamw\n"
    "from am_lightning.huggingface import attach\n"
    "accelerator = Accelerator(cpu=True, log_with='tensorboard', project_dir='runs')\n"
    "accelerator.init_trackers('x')\n"
    "model, optimizer = accelerator.prepare(model, am_adamw(model, lr=1e-3))\n"
)
WRAPPED = """\
import torch.distributed
from torch.distributed.fsdp import FullyShardedDataParallel
torch.distributed.init_process_group("gloo")
fsdp1_model = FullyShardedDataParallel(torch.nn.Linear(8, 8), use_orig_params=True, device_id=torch.device("cpu"))
ddp_model = torch.nn.parallel.DistributedDataParallel(model)
from am_lightning import AMAdamW
"""
DEEPSPEED = """\
import json, deepspeed, am_lightning.deepspeed
from am_lightning import am_adamw
json.dump({"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True}, open("ds_config.json", "w"))
"""
SAVED = "torch.save({'optimizer': torch.optim.AdamW(model.parameters()).state_dict()}, 'adamw.pt')\n"
WRITERS = (
    "from types import SimpleNamespace\n"
    "from torch.utils.tensorboard import SummaryWriter\nwriter = SummaryWriter('x')\n"
    "wandb = SimpleNamespace(run=SimpleNamespace(log=lambda scalars, step: None))\n"
)
TEXTS = """\
import pyarrow, pyarrow.parquet, os
os.makedirs("my_texts")
pyarrow.parquet.write_table(pyarrow.table({"text": [f"the {n}th text of many words " * 40 for n in range(4000)]}),
                            "my_texts/a.parquet")
"""
EVENTS = """\
from torch.utils.tensorboard import SummaryWriter
with SummaryWriter("runs/diagnoses/runs/healthy/logs") as board:
    for step in range(300):
        board.add_scalar("am/beta/cap", 0.8, step)
        for layer in ("layers.0", "layers.1", "norm"):
            board.add_scalar(f"am/beta/layer/{layer}/min", 0.3 if layer == "norm" else 0.6, step)
"""
FULLY_SHARD = "from torch.distributed.fsdp import fully_shard\nimport torch\n"
EXPORTED = """\
from am_lightning.pretrain.data.hf_tokenizer import as_pretrained
from am_lightning.pretrain.data.tokenizer import ByteTokenizer
from am_lightning.pretrain.model.network import build_llama
from am_lightning.pretrain.model.shape import LlamaShape
build_llama(LlamaShape(16, 24, 2, 1, 256, 128)).save_pretrained("my-llama")
as_pretrained(ByteTokenizer(), 128).save_pretrained("my-llama")
"""
LOGGED = "from lightning.fabric import Fabric\nfrom lightning.pytorch.loggers import TensorBoardLogger\n" + TORCH

# Page -> for each block the lines before it. A block that needs a GPU runs here with another word.
BEFORE = {
    "README.md": [LIGHTNING, STEPPED],
    "docs/after_training.md": [EXPORTED],
    "docs/data.md": [TEXTS],
    "docs/deepspeed.md": [TORCH + DEEPSPEED, ""],
    "docs/diagnosis.md": [EVENTS, LIGHTNING + "import torch\n"],
    "docs/huggingface.md": [LLAMA, ACCELERATED, "", LLAMA, LLAMA],
    "docs/index.md": [""],
    "docs/lightning.md": [LIGHTNING + FULLY_SHARD, LOGGED],
    "docs/migrating.md": [STEPPED + WRITERS, STEPPED, TORCH + "from am_lightning import AMAdamW\n" + SAVED],
    "docs/sharding.md": [LIGHTNING + "from am_lightning import AdaptiveMemory\n", TORCH + WRAPPED],
}
ON_A_CPU = {'strategy="fsdp"': 'strategy="ddp"', "devices=2": "devices=1"}


def blocks_of(page: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


def test_every_page_with_python_is_here() -> None:
    pages = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))]
    assert {page: len(found) for page in pages if (found := blocks_of(page))} == {
        page: len(before) for page, before in BEFORE.items()
    }


BLOCKS = [(page, number) for page, before in BEFORE.items() for number in range(len(before))]


def gate_of(page: str) -> pytest.MarkDecorator:
    """Return the gate: all but the fast one run the front page's blocks, and the nightly one runs the others."""
    return pytest.mark.slow if page == "docs/index.md" else pytest.mark.nightly("blocks of the pages")


@pytest.mark.parametrize(("page", "number"), [pytest.param(*block, marks=gate_of(block[0])) for block in BLOCKS])
def test_a_block_runs(page: str, number: int, tmp_path: Path) -> None:
    block = blocks_of(page)[number]
    for there, here in ON_A_CPU.items():
        block = block.replace(there, here)
    (tmp_path / "block.py").write_text(f"{BEFORE[page][number]}\n{block}")
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    run_python(tmp_path, ["block.py"], **alone)
