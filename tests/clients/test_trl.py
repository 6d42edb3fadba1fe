"""TRL's trainers: full fine-tuning with the factory, LoRA with the class, DPO with the optimizer itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from am_lightning import AMAdamW, am_adamw
from tests.clients import client

pytestmark = [pytest.mark.nightly("clients"), pytest.mark.slow]
WORDS = ("<eos>", "<unk>", "one", "two", "three", "four")
CURVES = {"am/beta/mean", "am/beta/min", "am/beta/max", "am/clamp/at_max", "am/clamp/at_zero", "am/skipped_steps"}


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes))


def options(folder: Path, **given: Any) -> dict[str, Any]:
    files = {"output_dir": str(folder), "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    numbers = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 2, "max_length": 16}
    return files | numbers | {"use_cpu": True, "bf16": False, "gradient_checkpointing": False} | given


def fine_tuned(folder: Path, optimizer: tuple[Any, dict[str, Any]], lora: Any = None, **given: Any) -> Any:
    """Return an SFTTrainer that has trained four steps."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from am_lightning.huggingface import AdaptiveMemoryCallback

    trainer = SFTTrainer(
        model=llama(),
        args=SFTConfig(**options(folder, **given)),
        train_dataset=Dataset.from_list([{"text": f"one {word} three"} for word in WORDS[2:] * 4]),
        processing_class=tokenizer(),
        peft_config=lora,
        optimizer_cls_and_kwargs=optimizer,
        callbacks=[AdaptiveMemoryCallback()],
    )
    trainer.train()
    return trainer


def curves(trainer: Any) -> dict[str, float]:
    """Return the last logged curves; the trainer must have logged them each time it logged the loss."""
    losses = [record for record in trainer.state.log_history if "loss" in record]
    assert [record["step"] for record in losses] == [2, 4]
    assert all(record.keys() >= CURVES and 0 <= record["am/beta/mean"] <= 0.9 for record in losses)
    return {tag: value for tag, value in losses[-1].items() if tag.startswith("am/")}


def groups(trainer: Any) -> set[str]:
    """Return the layer groups that have a curve."""
    tags = {tag.removeprefix("am/beta/") for tag in curves(trainer) if tag.startswith("am/beta/")}
    return tags - {"mean", "min", "max"}


def in_vain(recorded: pytest.WarningsRecorder) -> list[str]:
    return [str(warning.message) for warning in recorded if "is not used" in str(warning.message)]


def bare(trainer: Any) -> AMAdamW:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert type(optimizer) is AMAdamW
    assert {int(state["step"]) for state in optimizer.state.values()} == {4}
    return optimizer


def test_the_factory_takes_trls_arguments(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    client("trl")
    from am_lightning.huggingface import AMAdamWFactory

    trainer = fine_tuned(tmp_path, (AMAdamWFactory, {}), weight_decay=0.01)
    built = bare(trainer).param_groups
    assert {group["initial_lr"] for group in built} == {trainer.args.learning_rate} == {2e-5}  # not transformers' 5e-5
    assert {param.ndim > 1: group["weight_decay"] for group in built for param in group["params"]} == {
        True: 0.01,
        False: 0.0,
    }
    assert groups(trainer) == {"attn.qkv", "attn.out", "mlp", "norm", "embed", "head"}
    assert in_vain(recwarn) == []


def test_lora_has_the_groups_of_what_it_adapts(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    client("trl")
    peft = client("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"])
    trainer = fine_tuned(tmp_path, (AMAdamW, {"lr": 1e-3}), lora)
    optimizer = bare(trainer)
    names = list(optimizer.momentum())
    assert names and all("lora_" in name for name in names)  # the layers themselves are not trained
    assert groups(trainer) == {"attn.qkv", "mlp"}
    assert {group["initial_lr"] for group in optimizer.param_groups} == {1e-3}
    assert in_vain(recwarn) == []  # SFTConfig has another default learning rate, which nobody set


def test_a_learning_rate_in_vain_is_named(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    client("trl")
    fine_tuned(tmp_path, (AMAdamW, {"lr": 1e-3}), learning_rate=3e-4)
    (said,) = in_vain(recwarn)
    assert "SFTConfig.learning_rate=0.0003 is not used: the optimizer was built with lr 0.001" in said


def test_dpo_takes_the_optimizer(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    client("trl")
    from datasets import Dataset
    from transformers import LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    from am_lightning.huggingface import AdaptiveMemoryCallback

    llama().save_pretrained(tmp_path / "model")  # TRL reads the reference model from the path of the model
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    pairs = [{"prompt": "one", "chosen": f" two {word}", "rejected": f" four {word}"} for word in WORDS[2:] * 4]
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**options(tmp_path)),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer(),
        optimizers=(am_adamw(model, lr=1e-3), None),
        callbacks=[AdaptiveMemoryCallback()],
    )
    trainer.train()
    bare(trainer)
    assert not any(torch.equal(before[name], param) for name, param in model.named_parameters())
    assert groups(trainer) == {"attn.qkv", "attn.out", "mlp", "norm", "embed", "head"}
    assert in_vain(recwarn) == []
