"""Checks of a configuration that need neither weights nor a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import StrategyRegistry

from am_lightning.pretrain.commands.list import short, strategy_name
from am_lightning.pretrain.commands.plan.layout import read_engine, strategy_options, tensor_parallel_size
from am_lightning.pretrain.data.chunks import DATA_EXTRA
from am_lightning.pretrain.data.order import share_of
from am_lightning.pretrain.data.sources import HUB
from am_lightning.pretrain.data.tokenizer import BYTES, GATED_CURE, bpe_size, check_vocabulary, is_gated, is_path
from am_lightning.pretrain.model.parallelize import check_tensor_parallel
from am_lightning.pretrain.model.shape import count_parameters, count_tensors
from am_lightning.pretrain.runtime.errors import RecipeError, require
from am_lightning.pretrain.runtime.run_config import RunConfig
from am_lightning.pretrain.runtime.suggestions import meant


def check(settings: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield (heading, description) of what a run would be, from setting it up without weights.

    Raises:
        RecipeError: if a setting does not fit.
    """
    yield "model", _model(settings)
    yield "step", _step(settings)
    yield "data", _data(settings)
    if is_gated(settings.data.tokenizer):
        yield "tokenizer", f"{settings.data.tokenizer} is gated: {GATED_CURE}"
    yield "folders", _folders(settings)


def _model(settings: RunConfig) -> str:
    """Make the model and its optimizer on the meta device."""
    shape, optimizer = settings.shape, settings.check_optimizer()
    settings.make_schedule(optimizer)
    parameters = sum(param.numel() for group in optimizer.param_groups for param in group["params"])
    assert parameters == count_parameters(shape)
    return (
        f"{short(parameters)} parameters in {count_tensors(shape)} tensors, vocabulary {shape.vocab_size};"
        f" {type(optimizer).__name__}, {len(optimizer.param_groups)} groups"
    )


def _step(settings: RunConfig) -> str:
    """Check that the ranks make up the sizes of the strategy, and that the rows of a step can be shared evenly."""
    trainer, data = settings.config["trainer"], settings.data
    _check_strategy(trainer["strategy"])
    processes, note = _process_count(trainer)
    strategy, nodes = trainer["strategy"], trainer["num_nodes"]
    tensor = tensor_parallel_size(strategy, processes // nodes)
    groups = strategy_options(strategy).get("data_parallel_size", "auto")
    groups = nodes if groups == "auto" else int(groups)
    if strategy_name(strategy) == "ModelParallelStrategy" and groups * tensor != processes:
        raise RecipeError(
            f"trainer.strategy: data_parallel_size {groups} x tensor_parallel_size {tensor} is not"
            f" trainer.devices x trainer.num_nodes = {processes}"
        )
    check_tensor_parallel(settings.shape, tensor)
    rows = share_of(data.batch_size, processes // tensor, settings.accumulate)
    tokens = data.batch_size * settings.shape.seq_len
    layout = f", of which {tensor} share a layer" if tensor > 1 else ""
    return (
        f"{data.batch_size} rows of {settings.shape.seq_len} = {short(tokens)} tokens; {settings.steps} steps ="
        f" {short(tokens * settings.steps)} tokens; strategy {strategy_name(strategy)},"
        f" processes {processes}{note}{layout}, micro-batches {settings.accumulate} of {rows} rows"
    )


def _check_strategy(strategy: Any) -> None:
    """Refuse a name that Lightning does not have. A class was instantiated when the configuration was read."""
    known = ["auto", *sorted(StrategyRegistry.available_strategies())]
    if isinstance(strategy, str) and "." not in strategy and not strategy.endswith("Strategy"):
        allowed = f"one of Lightning's strategies, or a class{meant(strategy, known)}"
        require(strategy in known, "trainer.strategy", strategy, allowed)


def _process_count(trainer: dict[str, Any]) -> tuple[int, str]:
    """Return trainer.devices x trainer.num_nodes, and a note if this machine decides the number.

    Raises:
        RecipeError: if one of them is not a number of processes.
    """
    devices, nodes = trainer["devices"], trainer["num_nodes"]
    require(isinstance(nodes, int) and nodes >= 1, "trainer.num_nodes", nodes, "a whole number >= 1")
    if devices in ("auto", "-1", -1):
        here = torch.cuda.device_count() if trainer["accelerator"] != "cpu" else 0
        return max(1, here) * nodes, f" (trainer.devices {devices} on this machine)"
    count = len(devices) if isinstance(devices, list) else devices
    if isinstance(count, str) and count.isdigit():
        count = int(count)
    allowed = 'a whole number >= 1, a list of numbers, "auto" or -1'
    require(isinstance(count, int) and count >= 1, "trainer.devices", devices, allowed)
    return int(count) * nodes, ""


def _data(settings: RunConfig) -> str:
    """Check that the documents exist and that the model has an embedding for every token."""
    data = settings.data
    data.storage.folder()  # looks at the documents if they are on this machine
    name = data.tokenizer
    if name == BYTES or bpe_size(name) is not None:
        size = "known from its name"
    elif is_path(name) or Path(name).is_dir():
        tokenizer = data.pipeline.load_tokenizer()
        check_vocabulary(data.vocab_size, tokenizer.vocab_size, name)
        size = f"{tokenizer.vocab_size} tokens"
    else:
        size = "on the Hugging Face hub, not looked up"
    missing = ""  # a note, not an error: existing shards need no library, and another machine may make them
    if data.source.startswith(HUB) and find_spec("datasets") is None:
        missing = f"; making its shards needs the datasets library, which is not installed here: {DATA_EXTRA}"
    return f"{data.source}, mode {data.mode}; tokenizer {name} ({size}){missing}"


def _folders(settings: RunConfig) -> str:
    """Check that output folders can be written and input files exist."""
    for key, folder in {"trainer.default_root_dir": settings.root, "checkpoint.dirpath": settings.checkpoints}.items():
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        usable = nearest.is_dir() and os.access(nearest, os.W_OK)
        require(usable, key, str(folder), f"a folder that can be written ({nearest} cannot)")
    if settings.ckpt_path not in (None, "last"):
        exists = Path(str(settings.ckpt_path)).exists()
        require(exists, "ckpt_path", settings.ckpt_path, 'null, "last", or a checkpoint')
    engine = strategy_options(settings.config["trainer"]["strategy"]).get("config")
    if isinstance(engine, str):
        read_engine(Path(engine))
    return f"{settings.root}; checkpoints in {settings.checkpoints}"
