"""`sample` and `export`: use a trained model, whichever program and engine trained it."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pretrain
import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from tokenizers import models, pre_tokenizers, processors
from torch.distributed.checkpoint import save

from am_lightning.pretrain.commands.trained_run import TrainedRun, open_run
from am_lightning.pretrain.data.hf_tokenizer import as_pretrained
from am_lightning.pretrain.data.tokenizer import ByteTokenizer, load_named, train_bpe
from am_lightning.pretrain.model.lightning_module import LlamaPretraining
from am_lightning.pretrain.model.network import build_llama
from am_lightning.pretrain.model.shape import LlamaShape
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.recipes.__main__ import main
from tests.python import COLD, PYTHON

from . import exported
from .commands import RECIPES, TINY, arguments, load
from .entry_points import ENTRY_POINTS, ZERO, EntryPoint, launch
from .test_accelerate_checkpoints import Code
from .test_entry_points import needs_compiler

STEPS = 4
ALONE = ("pretrain", "pretrain_accelerate", "pretrain_hf_trainer")  # these run in one process
# The embedding is tied, heads share keys, and the tokenizer is trained here: an exported folder must keep all this.
GROUPED = {
    "model.tie_word_embeddings": "true",
    "model.num_key_value_heads": 1,
    "model.rope_theta": 500000,
    "model.vocab_size": 300,
    "data.tokenizer": "bpe-300",
}


def zero(stage: int) -> EntryPoint:
    settings = ["--trainer.devices", "2", "--trainer.strategy", "tests.deepspeed.entry_points.OnCPU"]
    return EntryPoint("pretrain.py", (*settings, "--trainer.strategy.config", str(ZERO / f"zero{stage}.json")))


PARALLEL = ("--trainer.devices", "2", "--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy")
PARALLEL += ("--trainer.strategy.data_parallel_size", "1")
SHARDED = {
    "Lightning FSDP2": ENTRY_POINTS["Lightning FSDP2"],
    "Lightning tensor parallel": EntryPoint(
        "lightning_fsdp2.py", (*PARALLEL, "--trainer.strategy.tensor_parallel_size", "2")
    ),
    "Accelerate FSDP2": ENTRY_POINTS["Accelerate FSDP2"],
    **{f"Lightning DeepSpeed {stage}": zero(stage) for stage in (1, 2, 3)},
    "Accelerate DeepSpeed 3": ENTRY_POINTS["Accelerate DeepSpeed 3"],
}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path) -> Callable[[str], Path]:
    """Return `run_of(NAME)`: the folder of a run of 4 steps, made once, with checkpoints of the steps 2 and 4."""
    runs: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in runs:
            root = tmp_path_factory.mktemp("trained") / "run"
            _train(name, root, corpus_folder)
            runs[name] = root
        return runs[name]

    return get


def _train(name: str, root: Path, corpus: Path) -> None:
    extra = ["--checkpoint.every_n_train_steps", "2"]
    if name == "pretrain":
        pretrain.main(arguments(root, corpus, STEPS, *extra))
        return
    if name == "grouped":
        pretrain.main(arguments(root, corpus, STEPS, *extra, *(f"--{key}={value}" for key, value in GROUPED.items())))
        return
    if name in ALONE:
        command = [PYTHON, str(RECIPES / f"{name}.py"), *arguments(root, corpus, STEPS, *extra)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240)
    else:
        ours = ("trainer.accelerator", "trainer.enable_progress_bar")  # launch() sets them
        settings = {**{key: value for key, value in TINY.items() if key not in ours}, "data.source": corpus}
        settings |= {"trainer.max_steps": STEPS, "trainer.val_check_interval": 5}
        extra += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        done = launch(SHARDED[name], "laptop", root, extra)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert f'am_lightning.recipes sample "{root}"' in done.stdout


def network_of(root: Path) -> LlamaPretraining:
    """Return the module that a run of pretrain.py in one process has trained."""
    checkpoint = load(root / "checkpoints" / "last.ckpt")
    arguments = {key: value for key, value in checkpoint["hyper_parameters"].items() if not key.startswith("_")}
    module = LlamaPretraining(**arguments)
    module.configure_model()
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval()


def logits_of(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    torch.set_num_threads(1)
    with torch.no_grad():
        out: Any = module(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def load_elsewhere(folder: Path, ids: torch.Tensor, *exports: Path) -> list[dict[str, Any]]:
    """Return what a new process finds in exported folders."""
    torch.save(ids, folder / "ids.pt")
    command = [COLD, exported.__file__, str(folder / "ids.pt"), str(folder / "out.pt"), *map(str, exports)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return list(load(folder / "out.pt").values())


IDS = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_an_exported_model_is_the_trained_one(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    """The exported model is bitwise equal in float32 for every program. The grouped model has its own tokenizer."""
    names = (*ALONE, "grouped")
    for name in names:
        assert main(["export", str(run_of(name)), str(tmp_path / name)]) == 0
    found = dict(zip(names, load_elsewhere(tmp_path, IDS, *(tmp_path / name for name in names)), strict=True))
    trained = logits_of(network_of(run_of("pretrain")), IDS)
    assert torch.equal(found["pretrain"]["logits"], trained)
    for name in ALONE[1:]:  # they train to the same weights, up to rounding
        assert torch.equal(found[name]["logits"], logits_of(open_run(run_of(name)).model(), IDS))
        torch.testing.assert_close(found[name]["logits"], trained, rtol=0, atol=1e-5)
    assert torch.equal(found["grouped"]["logits"], logits_of(network_of(run_of("grouped")), IDS))
    for name in ALONE:
        assert found[name]["tokens"] == list(exported.TEXT.encode())
    file = next((run_of("grouped") / "data" / "tokenizers").glob("*.json"))
    plain = tokenizers.Tokenizer.from_file(str(file)).encode(exported.TEXT).ids
    assert found["grouped"]["tokens"] == plain
    assert all(entry["end"] == [0, 0, 0] and entry["text"] == exported.TEXT for entry in found.values())


@pytest.mark.nightly("exports")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[needs_compiler]
            if "DeepSpeed" in name
            else [pytest.mark.sample]
            if name == "Lightning FSDP2"
            else [],
        )
        for name in SHARDED
    ],
)
def test_every_engines_checkpoints_are_exported(run_of: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Two processes train to the weights of one, up to rounding; the export equals what they saved, to the bit."""
    assert main(["export", str(run_of(name)), str(tmp_path / "out")]) == 0
    (found,) = load_elsewhere(tmp_path, IDS, tmp_path / "out")
    trained = logits_of(network_of(run_of("pretrain")), IDS)
    torch.testing.assert_close(found["logits"], trained, rtol=0, atol=1e-4)
    assert torch.equal(found["logits"], logits_of(open_run(run_of(name)).model(), IDS))
    before = logits_of(open_run(sorted((run_of(name) / "checkpoints").glob("step-*2*"))[0]).model(), IDS)
    assert (before - trained).abs().max() > 1e-2  # the bound above detects one step more or less
    if "DeepSpeed" in name:
        path = next((run_of(name) / "checkpoints").glob("step-*4*/*/*_optim_states.pt"))
        torch.save(Code(tmp_path / "ran"), path)
        (path.parent.parent / "manifest.json").unlink()
        with pytest.raises(SystemExit, match="holds more than tensors and plain values"):
            main(["export", str(path.parent.parent), str(tmp_path / "again")])
        assert not (tmp_path / "ran").exists() and not (tmp_path / "again").exists()


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, Any]:
    """Return a folder as Lightning's FSDP2 writes it, of a bfloat16 model, and the model."""
    shape = LlamaShape(16, 24, 2, 1, 256, 32)
    model = build_llama(shape).to(torch.bfloat16)
    folder = tmp_path / "step-000001.ckpt"
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save({"state_dict": weights, "optimizer_0": {"step": torch.ones(3)}}, checkpoint_id=folder)
    torch.save({"hyper_parameters": {**shape.state_dict(), "weight_decay": 0.1}}, folder / "meta.pt")
    return folder, model


def test_shards_keep_their_dtype_and_another_is_made(shards: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = shards
    for name in ("auto", "float32", "float16"):
        options = ["--tokenizer", "bytes", "--dtype", name]
        assert main(["export", str(folder), str(tmp_path / name), *options]) == 0
        found = load_file(tmp_path / name / "model.safetensors")
        dtype = torch.bfloat16 if name == "auto" else getattr(torch, name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config.get("dtype", config.get("torch_dtype")) == str(dtype).removeprefix("torch.")
        expected = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(weight.dtype == dtype for weight in found.values())
        assert all(torch.equal(weight, expected[key].to(dtype)) for key, weight in found.items())


def test_the_description_of_shards_runs_no_code(shards: tuple[Path, Any], tmp_path: Path) -> None:
    """torch's own reader would run code in the file."""
    folder, _ = shards
    (folder / ".metadata").write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    with pytest.raises(SystemExit, match=r"holds more than tensors and plain values: GLOBAL (posix|nt|os).mkdir"):
        main(["export", str(folder), str(tmp_path / "out"), "--tokenizer", "bytes"])
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(run_of("pretrain_accelerate"), root)
    newest = root / "checkpoints" / "step-000004"
    file = newest / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"step-000004 is broken \(wrong checksum of model.safetensors\)"):
        assert open_run(root).checkpoint == root / "checkpoints" / "step-000002"
    with pytest.raises(SystemExit, match=r"^error: the checkpoint .*step-000004 is broken \(wrong checksum.*newest"):
        main(["sample", str(newest), "--prompt", "x"])
    (root / "checkpoints" / "step-000002" / "manifest.json").unlink()
    with pytest.raises(SystemExit, match=r"^error: no checkpoint in .* is whole: step-000004 .*step-000002 .*another"):
        main(["export", str(root), str(tmp_path / "out")])


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    shape = LlamaShape(32, 64, 2, 2, 256, 32)
    weights = {f"model.{name}": weight / 0 for name, weight in build_llama(shape).state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "step-000001.ckpt")
    found = TrainedRun(tmp_path / "step-000001.ckpt", shape, as_pretrained(ByteTokenizer(), 32))
    with pytest.raises(RecipeError, match=r"embed_tokens\.weight has values that are not finite"):
        found.model()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.slow
def test_a_disk_that_refuses_leaves_nothing(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    root = str(run_of("pretrain"))
    (tmp_path / "out").mkdir()  # an empty folder is accepted
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(SystemExit, match=r"^error: cannot write .*/out: File too large .*choose another DIR"):
            main(["export", root, str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]
    assert main(["export", root, str(tmp_path / "out")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o666 & ~umask()}


@pytest.mark.slow
def test_samples_are_the_models_own(run_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The greedy tokens are those that our network finds without a cache; a seed repeats a text."""
    root = run_of("grouped")
    capsys.readouterr()

    def sample(*options: str) -> str:
        assert main(["sample", str(root), "--prompt", "def memory", *options]) == 0
        return capsys.readouterr().out

    tokenizer = open_run(root).tokenizer
    network, ids = network_of(root), tokenizer("def memory", return_tensors="pt")["input_ids"]
    for _ in range(8):
        ids = torch.cat([ids, logits_of(network, ids)[:, -1:].argmax(-1)], dim=1)
    assert sample("--temperature", "0", "--max_new_tokens", "8") == tokenizer.decode(ids[0]) + "\n"
    assert sample("--temperature", "1e-6", "--max_new_tokens", "8") == tokenizer.decode(ids[0]) + "\n"
    texts = [sample("--seed", seed, "--num_samples", "2") for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("--- 1 of 2\ndef memory") and "\n--- 2 of 2\ndef memory" in texts[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            "sample nowhere --prompt x",
            r"RUN is 'nowhere': there is no such file or folder; allowed: the folder of a run",
        ),
        ("sample {empty} --prompt x", r"RUN is '.*empty': no checkpoint is in .*checkpoints; allowed"),
        ("sample {run} --prompt=", r"--prompt is ''; allowed: a text"),
        ("sample {run} --prompt x --temperature -0.1", r"--temperature is -0.1; allowed: 0, or value >= 1e-06"),
        ("sample {run} --prompt x --temperature nan", r"--temperature is nan; allowed: 0, or value >= 1e-06"),
        ("sample {run} --prompt x --temperature 1e-44", r"--temperature is 1e-44; allowed: 0, or value >= 1e-06"),
        ("sample {run} --prompt x --top_k -1", r"--top_k is -1; allowed: a whole number >= 0"),
        ("sample {run} --prompt x --top_p 0", r"--top_p is 0.0; allowed: 0 < value <= 1"),
        ("sample {run} --prompt x --max_new_tokens 0", r"--max_new_tokens is 0; allowed: a whole number >= 1"),
        ("sample {run} --prompt x --num_samples 2 --temperature 0", r"--num_samples is 2; allowed: 1 with --temp"),
        ("sample {run} --prompt x --num_samples 0", r"--num_samples is 0; allowed: a whole number >= 1"),
        ("sample {run} --prompt x --seed -1", r"--seed is -1; allowed: 0 <= whole number"),
        ("sample {run} --prompt {long}", r"--prompt is 'x+'; allowed: fewer than 32 tokens"),
        ("export nowhere {new}", r"RUN is 'nowhere': there is no such file or folder"),
        ("export {run} {run}", r"DIR is '.*run', which exists already; allowed: a new folder, or an empty one"),
        ("export {run}/logs/config.yaml {new}", r"the checkpoint .*config.yaml is broken"),
        ("export {run} {new} --tokenizer ./gone", r"data.tokenizer is './gone'; allowed: an existing folder"),
        ("export {moved} {new}", r".*run has no logs/config.yaml that names the tokenizer: give it with --tokenizer"),
        ("export {bpe} {new}", r"the tokenizer bpe-300 of .*bpe is gone, or gives other tokens now: .* --tokenizer"),
        ("sample {bpe} --prompt x", r"the tokenizer bpe-300 of .*bpe is gone"),
    ],
)
def test_what_is_wrong_is_reported_in_a_line(
    run_of: Callable[[str], Path], tmp_path: Path, command: str, says: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty", "new": tmp_path / "new", "run": run_of("pretrain"), "long": "x" * 32}
    if "{moved}" in command:
        places["moved"] = tmp_path / "run"
        shutil.copytree(run_of("pretrain") / "checkpoints", tmp_path / "run" / "checkpoints")
    if "{bpe}" in command:
        places["bpe"] = tmp_path / "bpe"
        shutil.copytree(run_of("grouped"), tmp_path / "bpe", ignore=shutil.ignore_patterns("tokenizers"))
    with pytest.raises(SystemExit, match=f"^error: {says}") as caught:
        main([word.format(**places) for word in command.split()])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_tokenizer_is_the_one_that_made_the_tokens(
    run_of: Callable[[str], Path], tmp_path: Path, corpus_folder: Path
) -> None:
    """It is found among several in a shared cache, and for shards made elsewhere. A changed tokenizer is refused."""
    root = tmp_path / "run"
    shutil.copytree(run_of("grouped"), root)
    (file,) = (root / "data" / "tokenizers").glob("*.json")
    other = tmp_path / "other.json"
    train_bpe(300, [b"other words, other pairs " * 50], other)
    shutil.copy(other, file.with_name("bpe-300-of-another.json"))
    ids = open_run(root).tokenizer("def memory momentum")["input_ids"]
    assert ids == open_run(root, str(file)).tokenizer("def memory momentum")["input_ids"]
    assert ids != open_run(root, str(other)).tokenizer("def memory momentum")["input_ids"]
    for name in ("logs", "checkpoints"):  # as a new run moves it away, without its data
        shutil.copytree(root / name, root / "earlier" / "1" / name)
    assert open_run(root / "earlier" / "1").tokenizer("def memory momentum")["input_ids"] == ids

    config = root / "logs" / "config.yaml"
    text = config.read_text()
    (shards,) = (path.parent for path in (root / "data").glob("*/index.json"))
    moved = text.replace(f"source: {corpus_folder}", f"source: {shards}").replace(
        "tokenizer: bpe-300", "tokenizer: bytes"
    )
    assert moved != text
    config.write_text(moved)
    assert open_run(root).tokenizer("def memory momentum")["input_ids"] == ids
    config.write_text(text)
    shutil.copy(other, file)
    with pytest.raises(
        RecipeError, match=r"bpe-300 of .* is gone, or gives other tokens now: give it with --tokenizer"
    ):
        open_run(root)


def test_bytes_have_the_ids_of_the_data() -> None:
    tokenizer = as_pretrained(ByteTokenizer(), 32)
    texts = [
        "def f(x):\n\treturn x",
        "\0",
        "a\0Ā b",
        " é‱😀",
        *(chr(code) for code in (*range(256), 0x100, 0x7FF, 0xFFFF)),
    ]
    for text in texts:
        ids = list(text.encode())
        assert tokenizer(text)["input_ids"] == ids and tokenizer.decode(ids) == text
    assert len(tokenizer) == 256 and tokenizer.eos_token_id == 0
    assert tokenizer.decode([104, 105, 0], skip_special_tokens=True) == "hi"


def test_a_prompt_is_not_ended(tmp_path: Path) -> None:
    """T5's tokenizer ends every text with an end of text, after which a model would begin a new one."""
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert backend.encode("a b").ids == [0, 1, 2]
    tokenizer = as_pretrained(load_named(str(tmp_path)), 32)
    assert tokenizer("a b")["input_ids"] == [0, 1] and tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == 32
