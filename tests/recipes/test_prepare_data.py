"""Tests of the program that makes shards before a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import prepare_data
import pretrain
import pytest
import yaml

from am_lightning.pretrain.data.shards import read_index
from am_lightning.pretrain.data.text_data import TextData
from am_lightning.pretrain.runtime.paths import recipe_files
from am_lightning.pretrain.runtime.recipe_text import recipe_text

from .commands import arguments
from .test_tokenizers import t5_folder  # noqa: F401  (a fixture)

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

CONFIGS = Path(prepare_data.__file__).parent / "configs"


def shards(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (root / "data").rglob("*") if path.is_file()}


def test_pretrain_finds_what_it_made(tmp_path: Path, corpus_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The data section, the linked keys and the run's folder come from the recipe."""
    recipe = yaml.safe_load(recipe_text(CONFIGS / "laptop.yaml"))
    recipe["data"]["source"] = str(corpus_folder)
    recipe["model"]["seq_len"] = 32
    recipe["trainer"]["default_root_dir"] = str(tmp_path / "run")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    prepare_data.main(["--config", str(tmp_path / "mine.yaml"), "--workers", "1"])
    assert "of 32 tokens" in capsys.readouterr().out
    made = shards(tmp_path / "run")
    assert made
    pretrain.main(arguments(tmp_path / "run", corpus_folder, 1))
    assert shards(tmp_path / "run") == made


def test_a_second_call_does_nothing_and_says_so(
    tmp_path: Path, corpus_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--config=laptop", f"--root={tmp_path}", f"--data.source={corpus_folder}"]
    prepare_data.main(args)
    assert ": made" in capsys.readouterr().out
    made = shards(tmp_path)
    prepare_data.main(args)
    output = capsys.readouterr().out
    assert ": complete, nothing to do" in output
    assert f"of the text in {corpus_folder}" in output
    assert shards(tmp_path) == made


def test_check_reads_everything(tmp_path: Path, corpus_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--root", str(tmp_path), "--data.source", str(corpus_folder), "--check"]
    prepare_data.main(args)
    assert "all checksums are right" in capsys.readouterr().out
    (shard,) = (tmp_path / "data").rglob("train-*.bin")
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SystemExit, match=rf"error: the token shard {shard} is broken: its content .*Delete"):
        prepare_data.main(args)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return four files of 24 000 words each. Both splits get at least one row of the largest recipe."""
    folder = tmp_path_factory.mktemp("parquet")
    for number in range(4):
        texts = [f"{number}{i} " + "the memory of many steps " * 12 for i in range(400)]
        pq.write_table(pa.table({"text": texts}), folder / f"{number}.parquet")
    return folder


@pytest.mark.filterwarnings("ignore:.*suggested max number of worker.*")
@pytest.mark.parametrize("name", sorted(recipe_files()))
def test_a_recipe_reads_files_and_a_tokenizer_of_this_disk(
    tmp_path: Path,
    parquet: Path,
    t5_folder: Path,  # noqa: F811
    name: str,
) -> None:
    """Only the source, the tokenizer and the held-out share of the recipe's data section change."""
    changes = {
        "source": "hf:parquet",
        "source_options": {"data_files": str(parquet / "*.parquet"), "split": "train"},
        "tokenizer": str(t5_folder),
        "val_percent": 10,
    }
    args = ["--config", name, "--root", str(tmp_path), "--workers", "1"]
    for key, value in changes.items():
        args += [f"--data.{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    prepare_data.main(args)
    recipe = yaml.safe_load(recipe_text(recipe_files()[name]))
    shape = {key: recipe["model"][key] for key in ("seq_len", "vocab_size")}
    data = TextData(**{**recipe["data"], **shape, **changes})
    data.default_root_dir = str(tmp_path)
    assert data.storage.is_complete()
    data.open()
    batch = next(iter(data.train_loader(steps=1, accumulate=data.batch_size)))
    assert tuple(batch.shape) == (1, data.seq_len)
    assert len(next(iter(data.val_loader()))) >= 1


@pytest.mark.slow
def test_several_processes_make_the_same(
    tmp_path: Path,
    parquet: Path,
    t5_folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The tokenizer is sent to the other processes."""
    args = ["--config", "60m", "--data.source", "hf:parquet", "--data.tokenizer", str(t5_folder)]
    args += ["--data.source_options", json.dumps({"data_files": str(parquet / "*.parquet")})]
    for workers in (1, 2):
        prepare_data.main([*args, "--root", str(tmp_path / str(workers)), "--workers", str(workers)])
    one, two = (next((tmp_path / str(workers) / "data").glob("*/index.json")) for workers in (1, 2))
    assert one.read_bytes() == two.read_bytes()
    index = read_index(two.parent)
    assert sum(index.documents.values()) == 1600
    assert len(index.train) == 4
    assert f"tokenizer  {t5_folder}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--config", "laptp"], r"error: config is 'laptp'.*Did you mean laptop"),
        (["--data.source", "gone"], r"error: data.source gone does not exist"),
        (["--config", "laptop", "--data.tokenizer", "bpe-4096"], r"error: model.vocab_size is 256; allowed: >= 4096"),
        (["--config", "CUT"], r"error: .*cut.yaml is not YAML: while parsing"),
        (["--config", "FLAT"], r"flat.yaml: data is 3; allowed: settings of the form"),
        (["--data.sorce", "x"], "there is no setting data.sorce. Did you mean data.source"),
        (["laptop"], "laptop"),
        (["--workers", "x"], "argument --workers"),
        (["--workers", "0"], r"error: data.prepare_workers is 0; allowed: a whole number >= 1"),
    ],
)
def test_a_wrong_argument_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], args: list[str], says: str
) -> None:
    for name, text in (("CUT", "data: ["), ("FLAT", "data: 3")):
        path = tmp_path / f"{name.lower()}.yaml"
        path.write_text(text)
        args = [str(path) if arg == name else arg for arg in args]
    with pytest.raises(SystemExit) as caught:
        prepare_data.main([*args, "--root", str(tmp_path)])
    if says.startswith("error"):
        assert re.match(says, str(caught.value.code))
    else:
        errors = capfd.readouterr().err
        assert re.search(says, errors)
        assert len(errors.splitlines()) < 8
        assert caught.value.code == 2
    assert not (tmp_path / "data").exists()
