"""What can be known to be wrong with a configuration before a machine is paid for."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import StrategyRegistry

from am_lightning.pretrain.commands.list import short, strategy_name
from am_lightning.pretrain.commands.plan.layout import read_engine
from am_lightning.pretrain.data.chunks import DATA_EXTRA
from am_lightning.pretrain.data.sources import HUB
from am_lightning.pretrain.data.tokenizer import BYTES, GATED_CURE, bpe_size, check_vocabulary, is_gated
from am_lightning.pretrain.model.parallelize import check_tensor_parallel
from am_lightning.pretrain.model.shape import count_parameters, count_tensors
from am_lightning.pretrain.runtime.errors import RecipeError, require
from am_lightning.pretrain.runtime.run_config import RunConfig


def check(settings: RunConfig) -> Iterator[tuple[str, str]]:
    """What a run would be, in (what, words), found by doing it without weights.

    Raises:
        RecipeError: something does not fit; the text names the key.
    """
    yield "model", _model(settings)
    yield "step", _step(settings)
    yield "data", _data(settings)
    if is_gated(settings.data.tokenizer):
        yield "tokenizer", f"{settings.data.tokenizer} is gated: {GATED_CURE}"
    yield "folders", _folders(settings)


def _model(settings: RunConfig) -> str:
    """The model and its optimizer, on the meta device."""
    shape, optimizer = settings.shape, settings.check_optimizer()
    settings.make_schedule(optimizer)
    parameters = sum(param.numel() for group in optimizer.param_groups for param in group["params"])
    assert parameters == count_parameters(shape)
    return (
        f"{short(parameters)} parameters in {count_tensors(shape)} tensors, vocabulary {shape.vocab_size};"
        f" {type(optimizer).__name__}, {len(optimizer.param_groups)} groups"
    )


def _step(settings: RunConfig) -> str:
    """The rows of a step are shared evenly."""
    trainer, data = settings.config["trainer"], settings.data
    _check_strategy(trainer["strategy"])
    processes, said = process_count(trainer)
    tensor = tensor_parallel_size(trainer, processes)
    check_tensor_parallel(settings.shape, tensor)
    if processes % tensor:
        raise RecipeError(
            f"trainer.strategy: tensor_parallel_size {tensor} does not divide trainer.devices x trainer.num_nodes ="
            f" {processes}"
        )
    shares = processes // tensor * settings.accumulate
    allowed = (
        f"a multiple of {processes // tensor} (processes with rows of their own) x {settings.accumulate}"
        " (trainer.accumulate_grad_batches)"
    )
    require(data.batch_size % shares == 0, "data.batch_size", data.batch_size, allowed)
    tokens = data.batch_size * settings.shape.seq_len
    layout = f", {tensor} share a layer" if tensor > 1 else ""
    return (
        f"{data.batch_size} rows of {settings.shape.seq_len} = {short(tokens)} tokens; {settings.steps} steps ="
        f" {short(tokens * settings.steps)} tokens; strategy {strategy_name(trainer['strategy'])},"
        f" processes {processes}{said}{layout}, micro-batches {settings.accumulate} of {data.batch_size // shares} rows"
    )


def _check_strategy(strategy: Any) -> None:
    """A name is one of Lightning's; a class was instantiated when the configuration was read."""
    known = ["auto", *sorted(StrategyRegistry.available_strategies())]
    if isinstance(strategy, str) and "." not in strategy and not strategy.endswith("Strategy"):
        near = difflib.get_close_matches(strategy, known, n=1)
        allowed = f"{near[0]}, or another of" if near else "one of"
        require(strategy in known, "trainer.strategy", strategy, f"{allowed} Lightning's strategies, or a class")


def process_count(trainer: dict[str, Any]) -> tuple[int, str]:
    """trainer.devices x trainer.num_nodes, and in words where it is this machine that decides.

    Raises:
        RecipeError: one of them is no number of processes.
    """
    devices, nodes = trainer["devices"], trainer["num_nodes"]
    require(isinstance(nodes, int) and nodes >= 1, "trainer.num_nodes", nodes, "a whole number >= 1")
    if isinstance(devices, list):
        return len(devices) * nodes, ""
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if devices in ("auto", "-1", -1):
        found = torch.cuda.device_count() if trainer["accelerator"] != "cpu" else 0
        here = max(1, found)
        return here * nodes, f" (trainer.devices {devices} here)"
    allowed = 'a whole number >= 1, a list of numbers, "auto" or -1'
    require(isinstance(devices, int) and devices >= 1, "trainer.devices", devices, allowed)
    return int(devices) * nodes, ""


def tensor_parallel_size(trainer: dict[str, Any], processes: int) -> int:
    """Ranks that share a layer: ModelParallelStrategy's, 1 for the others.

    Raises:
        RecipeError: its two sizes do not make up the processes.
    """
    strategy = trainer["strategy"]
    if strategy_name(strategy) != "ModelParallelStrategy":
        return 1
    nodes = trainer["num_nodes"]
    options = strategy.get("init_args", {}) if isinstance(strategy, dict) else {}
    data = options.get("data_parallel_size", "auto")
    tensor = options.get("tensor_parallel_size", "auto")
    data = nodes if data == "auto" else int(data)
    tensor = processes // nodes if tensor == "auto" else int(tensor)
    if data * tensor != processes:
        raise RecipeError(
            f"trainer.strategy: data_parallel_size {data} x tensor_parallel_size {tensor} is not"
            f" trainer.devices x trainer.num_nodes = {processes}"
        )
    return tensor


def _data(settings: RunConfig) -> str:
    """The documents are there, and the model has an embedding for every token."""
    data = settings.data
    pipeline = data.pipeline()
    pipeline.fingerprint()  # looks at the documents, where they are on this machine
    name = data.tokenizer
    if name == BYTES or bpe_size(name) is not None:
        size = "known by name"
    elif Path(name).expanduser().is_dir():
        tokenizer = pipeline.load_tokenizer()
        check_vocabulary(data.vocab_size, tokenizer.vocab_size, name)
        size = f"{tokenizer.vocab_size} tokens"
    elif name.startswith(("/", ".", "~")):
        raise RecipeError(f"data.tokenizer is {name!r}: there is no such folder")
    else:
        size = "on the Hugging Face hub, not looked at"
    return f"{data.source}, mode {data.mode}; tokenizer {name} ({size}){_missing_library(data.source)}"


def _missing_library(source: str) -> str:
    """No error: shards that are made already need no library, and another machine may make them."""
    if not source.startswith(HUB) or find_spec("datasets") is not None:
        return ""
    return f"; making its shards needs the datasets library, which is not installed here: {DATA_EXTRA}"


def _folders(settings: RunConfig) -> str:
    """What is to be written can be, what is to be read is there."""
    for key, folder in {"trainer.default_root_dir": settings.root, "checkpoint.dirpath": settings.checkpoints}.items():
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        usable = nearest.is_dir() and os.access(nearest, os.W_OK)
        require(usable, key, str(folder), f"a folder that can be written ({nearest} cannot)")
    if settings.ckpt_path not in (None, "last", "best"):
        require(
            Path(str(settings.ckpt_path)).exists(), "ckpt_path", settings.ckpt_path, 'null, "last", or a checkpoint'
        )
    strategy = settings.config["trainer"]["strategy"]
    engine = strategy.get("init_args", {}).get("config") if isinstance(strategy, dict) else None
    if isinstance(engine, str):
        read_engine(Path(engine))
    return f"{settings.root}; checkpoints in {settings.checkpoints}"
