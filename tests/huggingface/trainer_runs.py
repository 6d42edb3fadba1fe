"""A tiny GPT-2 under transformers' Trainer, for test_trainer.py in its process and in each rank that it starts."""

from __future__ import annotations

import faulthandler
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from am_lightning import AMAdamW
from am_lightning.huggingface import AdaptiveMemoryCallback, AMAdamWFactory
from tests.device import ON_GPU
from tests.huggingface.launch import finish
from tests.huggingface.sharded import force, let_fsdp1_run_on_cpu, plugin_of
from tests.lacking import unless_lacking

STEPS, SAVE, LOG = 8, 5, 2
FORMS: dict[str, Any] = {
    "class": (AMAdamW, {"lr": 0.07, "betas": (0.89, 0.95)}),
    "factory": (AMAdamWFactory, {"overrides": {"wpe": {"lr": 0.035}}}),
}


class Tokens(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index % 8)
        tokens = torch.randint(0, 12, (16,), generator=generator)
        return {"input_ids": tokens, "labels": tokens}


def make_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 12, "n_positions": 16}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=0))


class Watch(TrainerCallback):
    """Record beta_t after each step from the optimizer itself; spoil the gradients of some steps."""

    def __init__(self, bad_steps: tuple[int, ...] = ()) -> None:
        self.bad_steps = bad_steps
        self.seen: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step + 1 in self.bad_steps:
            next(model.parameters()).grad.fill_(float("nan"))

    def on_step_end(self, args, state, control, optimizer=None, **kwargs) -> None:
        betas = optimizer.optimizer.momentum()
        self.seen.append({name: float(beta) for name, beta in betas.items()})


class FSDP1Trainer(Trainer):
    version = 1

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        options = {"use_orig_params": True} if self.version == 1 else {}
        force(self.accelerator, plugin_of(self.version, "GPT2Block", **options))
        self.is_fsdp_enabled = True


class FSDP2Trainer(FSDP1Trainer):
    version = 2


def make_trainer(folder: Path, *, batch: int, watch: Watch | None = None, **options: Any) -> Trainer:
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": batch,
        "logging_steps": LOG,
        "save_steps": SAVE,
        "report_to": "tensorboard",
        "learning_rate": 0.07,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "lr_scheduler_type": "constant",
        "use_cpu": not ON_GPU,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        **options.pop("arguments", {}),
    }
    callbacks = options.pop("callbacks", [AdaptiveMemoryCallback(), watch or Watch()])
    args = options.pop("args_class", TrainingArguments)(str(folder), **arguments)
    model = options.pop("model", None) or make_model()
    trainer_class = options.pop("trainer_class", Trainer)
    return trainer_class(model, args, train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=callbacks, **options)


def run(
    folder: Path,
    form: str,
    *,
    batch: int,
    resume: Path | None = None,
    bad_steps: tuple[int, ...] = (),
    trainer_class: type[Trainer] = Trainer,
    **arguments: Any,
) -> dict[str, Any]:
    """Train, or resume from the checkpoint that an earlier run left in ``resume``."""
    watch = Watch(bad_steps)
    trainer = make_trainer(
        folder,
        batch=batch,
        watch=watch,
        optimizer_cls_and_kwargs=FORMS[form],
        trainer_class=trainer_class,
        arguments=arguments,
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume / f"checkpoint-{SAVE}"))
    optimizer = trainer.optimizer.optimizer
    return {
        "seen": watch.seen,
        "history": trainer.state.log_history,
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "described": optimizer.current_layout().describe(),
        "distributed": trainer.accelerator.distributed_type.value,
        "callbacks": [type(callback).__name__ for callback in trainer.callback_handler.callbacks],
    }


def main(path: Path) -> None:
    faulthandler.dump_traceback_later(140, exit=True)
    let_fsdp1_run_on_cpu()
    job = json.loads(path.read_text())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        folder = Path(job["folder"])
        results: dict[str, Any] = {form: unless_lacking(run, folder / form, form, batch=2) for form in FORMS}
        results["resumed"] = unless_lacking(run, folder / "resumed", "class", batch=2, resume=folder / "class")
        for form, kind in (("class", FSDP1Trainer), ("factory", FSDP1Trainer), ("class", FSDP2Trainer)):
            name = f"{kind.__name__} {form}"
            results[name] = unless_lacking(run, folder / name, form, batch=2, trainer_class=kind, save_strategy="no")
    results["warned"] = [str(warning.message) for warning in warned if "beta_t" in str(warning.message)]
    finish(results, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
