"""Read the weights in a checkpoint of any training program and engine, without running code that it may contain."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from am_lightning.distributed.names import strip_wrappers
from am_lightning.pretrain.runtime.errors import RecipeError, first_line, needs

# The files in a folder, and the keys in them, that describe the model: of Lightning's shards, pretrain_accelerate.py,
# pretrain_hf_trainer.py and Lightning's DeepSpeed folders.
_DESCRIPTIONS = (
    ("meta.pt", "hyper_parameters"),
    ("states.pt", "model"),
    ("data.pt", "shape"),
    ("checkpoint/*model_states.pt", "hyper_parameters"),
)
_SHARDS = (".", "pytorch_model_fsdp_0")  # folders of Lightning's and Accelerate's shards
_EMBEDDING = "model.embed_tokens.weight"  # in every LlamaForCausalLM


def is_checkpoint(path: Path) -> bool:
    """Return whether `path`, a file or a folder, is a checkpoint of one of the training programs."""
    return path.is_file() or any(any(path.glob(pattern)) for pattern, _ in _DESCRIPTIONS)


def model_arguments(path: Path) -> dict[str, Any]:
    """Return the arguments of the model in the checkpoint at `path`, which include those of LlamaShape.

    Raises:
        RecipeError: if `path` is not a checkpoint of these programs.
    """
    places = [(file, key) for pattern, key in _DESCRIPTIONS for file in sorted(path.glob(pattern))[:1]]
    for file, key in places if path.is_dir() else [(path, "hyper_parameters")]:
        with _named(path):
            return dict(_load(file)[key])
    raise RecipeError(f"{path} is not a checkpoint of these programs: nothing in it describes a model")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a Llama by their names in LlamaForCausalLM, on the CPU, in the dtype of the training.

    Weights that DeepSpeed's ZeRO has partitioned are the float32 copies of its optimizer.

    Args:
        path: a file or a folder that Lightning, Accelerate or the HF Trainer has written.

    Raises:
        RecipeError: if `path` contains no Llama, or if DeepSpeed has written it and is not installed.
        pickle.UnpicklingError: if `path` contains more than tensors and plain values.
    """
    with _named(path):
        if path.is_file():
            return _of_llama(_load(path)["state_dict"])
        if (path / "latest").exists():
            return _of_llama(_read_deepspeed(path))
        for folder in (path / name for name in _SHARDS):
            if (folder / ".metadata").exists():
                return _read_shards(folder)
        found: dict[str, Tensor] = {}
        for file in sorted(path.glob("model*.safetensors")):
            found |= load_file(file)
        return _of_llama(found)


def _load(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise RecipeError(f"{path} is not a checkpoint of these programs ({first_line(error)})") from error


def _llama_names(names: Iterable[str]) -> dict[str, str]:
    """Map the names of the model's weights in a checkpoint to their names in LlamaForCausalLM."""
    plain = {name: strip_wrappers(name) for name in names}
    prefix = next((name.removesuffix(_EMBEDDING) for name in plain.values() if name.endswith(_EMBEDDING)), None)
    if prefix is None:
        raise RecipeError(f"the checkpoint holds no Llama: no {_EMBEDDING} is in it")
    return {name: own.removeprefix(prefix) for name, own in plain.items() if own.startswith(prefix)}


def _of_llama(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[own] for own, name in _llama_names(weights).items()}


# ---------------------------------------------------------------------- torch.distributed.checkpoint
_OWN = "torch.distributed.checkpoint.metadata"
# All that the pickle `.metadata` refers to, except dtypes.
_DESCRIBING = {
    *((_OWN, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_OWN, f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
    (_OWN, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("pathlib", f"{system}Path") for system in ("Posix", "Windows")),
}


class _Unpickler(pickle.Unpickler):
    """Creates the objects that describe shards, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        public = "pathlib" if module.startswith("pathlib.") else module  # Python 3.13 moved its classes to a submodule
        if not is_dtype and (public, name) not in _DESCRIBING:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} in the description of the shards")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Reads `.metadata` without running code in it, which torch's reader would do."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        with open(Path(self.path, ".metadata"), "rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        return metadata


def _read_shards(folder: Path) -> dict[str, Tensor]:
    reader = _Reader(folder)
    saved = reader.read_metadata().state_dict_metadata
    tensors = {key: entry for key, entry in saved.items() if isinstance(entry, TensorStorageMetadata)}
    names = _llama_names(tensors)
    found = {key: torch.empty(tensors[key].size, dtype=tensors[key].properties.dtype) for key in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this is a single process
        load(found, storage_reader=reader)
    return {name: found[key] for key, name in names.items()}


# ---------------------------------------------------------------------- DeepSpeed
def _read_deepspeed(path: Path) -> dict[str, Tensor]:
    folder = path / (path / "latest").read_text().strip()
    if not list(folder.glob("*optim_states.pt")):  # stage 0 partitions nothing
        module: dict[str, Tensor] = _load(folder / "mp_rank_00_model_states.pt")["module"]
        return module
    text = f"{path} was written by DeepSpeed, which is needed to read it: pip install 'am-lightning[deepspeed]'"
    with contextlib.redirect_stdout(sys.stderr), needs("deepspeed", text):  # DeepSpeed logs to stdout on import
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    plain = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        torch.serialization.safe_globals(plain),
        # torch.load runs no code then, although DeepSpeed calls it with weights_only=False.
        patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"),
    ):
        partitioned = get_fp32_state_dict_from_zero_checkpoint(str(path), folder.name)
    return {name: tensor.detach().clone() for name, tensor in partitioned.items()}  # views of one tensor
