"""The trained model of a run of any of the programs: newest whole checkpoint, shape, weights and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from am_lightning.pretrain.checkpoints.manifest import damage
from am_lightning.pretrain.checkpoints.resume import LAST, STEPS, newest_whole
from am_lightning.pretrain.checkpoints.run_folder import ACCELERATE_STEPS, TRAINER_STEPS
from am_lightning.pretrain.checkpoints.weights import is_checkpoint, model_arguments, read_weights
from am_lightning.pretrain.commands.arguments import RUN
from am_lightning.pretrain.data.hf_tokenizer import as_pretrained
from am_lightning.pretrain.data.shards import INDEX, read_index
from am_lightning.pretrain.data.tokenizer import BYTES, Tokenizer, bpe_size, check_vocabulary, load_bpe, load_named
from am_lightning.pretrain.model.network import llama_config
from am_lightning.pretrain.model.shape import LlamaShape
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.settings import saved_config

_NAMES = (STEPS, LAST, ACCELERATE_STEPS, TRAINER_STEPS)


@dataclass(frozen=True)
class TrainedRun:
    """A trained model."""

    checkpoint: Path  # the file or folder with the weights
    shape: LlamaShape  # shape of the Llama
    tokenizer: PreTrainedTokenizerFast  # the tokenizer that the model was trained with

    def model(self) -> LlamaForCausalLM:
        """Return transformers' model in eval mode on the CPU, in the dtype of the checkpoint. It generates up to the
        end of a text.

        Raises:
            RecipeError: if the checkpoint's weights have other names or shapes.
        """
        end, weights = self.tokenizer.eos_token_id, read_weights(self.checkpoint)
        if wrong := [name for name, weight in weights.items() if not bool(weight.isfinite().all())]:
            raise RecipeError(f"{self.checkpoint}: {wrong[0]} has values that are not finite; give an older checkpoint")
        config = llama_config(self.shape, bos_token_id=None, eos_token_id=end)
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(config)
        if self.shape.tie_word_embeddings:  # a checkpoint may leave out the head
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            words = " ".join(str(error).split())
            raise RecipeError(f"the weights do not fit the model that was saved with them: {words}") from error
        model.tie_weights()
        # The buffers follow from the configuration. On the meta device they have no values.
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
        model.generation_config.pad_token_id = end  # in the model's config it would freeze a row of the embedding
        trained: LlamaForCausalLM = model.eval()
        return trained


def open_run(path: Path, tokenizer: str | None = None) -> TrainedRun:
    """Find a trained model. Its weights are not read yet.

    Args:
        path: the folder of a run, whose newest whole checkpoint is taken, or a checkpoint.
        tokenizer: as `data.tokenizer`, or the tokenizer.json of a bpe-N; None: the run's.

    Raises:
        RecipeError: if there is no whole checkpoint of these programs or no tokenizer.
    """
    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    checkpoint = path if is_checkpoint(path) else _newest(path)
    if checkpoint == path and (problem := damage(path, ours=False)) is not None:
        hint = "Give its run's folder for the newest whole one"
        raise RecipeError(f"the checkpoint {path} is broken ({problem}). {hint}")
    shape = LlamaShape.among(model_arguments(checkpoint))
    root = next((folder for folder in (path, *path.parents[:2]) if saved_config(folder)), path)
    found = _named(tokenizer) if tokenizer is not None else _of_run(root)
    check_vocabulary(shape.vocab_size, found.vocab_size, found.name)
    return TrainedRun(checkpoint, shape, as_pretrained(found, shape.seq_len))


def _newest(root: Path) -> Path:
    saved = (saved_config(root).get("checkpoint") or {}).get("dirpath")
    for folder in (root / "checkpoints", root, *([Path(saved)] if saved else [])):
        if (found := newest_whole(folder, _NAMES, "Give another RUN.")) is not None:
            return found
    raise RecipeError(f"RUN is {str(root)!r}: no checkpoint is in {root / 'checkpoints'}; allowed: {RUN}")


def _of_run(root: Path) -> Tokenizer:
    """Return the tokenizer that made the run's tokens, which the index of its shards identifies if it still exists. The
    documents are not needed."""
    data = saved_config(root).get("data")
    if not isinstance(data, dict):
        raise RecipeError(f"{root} has no logs/config.yaml that names the tokenizer: give it with --tokenizer")
    name, made = data["tokenizer"], Path(data["source"]).expanduser()
    held = root.parents[1] if root.parent.name == "earlier" else root  # a run is moved to earlier/N without its data
    cache = Path(data.get("cache_dir") or held / "data")
    shards = [path.parent for path in cache.glob(f"*/{INDEX}")]
    if (made / INDEX).exists():  # made by prepare_data.py, perhaps with another tokenizer than the configuration names
        name, cache, shards = read_index(made).tokenizer, made.parent, [made]
    used = {index.tokenizer_sha256 for index in map(read_index, shards) if index.tokenizer == name}
    if bpe_size(name) is None:
        candidates = [_named(name)]
    else:
        candidates = [load_bpe(name, file) for file in (cache / "tokenizers").glob(f"{name}-*.json")]
    found = {one.fingerprint: one for one in candidates if not used or one.fingerprint in used}
    if len(found) != 1:
        what = f"is one of {len(found)} in {cache / 'tokenizers'}" if found else "is gone, or gives other tokens now"
        raise RecipeError(f"the tokenizer {name} of {root} {what}: give it with --tokenizer")
    return next(iter(found.values()))


def _named(name: str) -> Tokenizer:
    if name != BYTES and (file := Path(name).expanduser()).is_file():
        return load_bpe(name, file)
    return load_named(name)
