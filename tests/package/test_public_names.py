"""Every public name with its arguments: none may disappear or change without this test failing.

Add every new name here. Annotations are left out, because they name classes that may move.
"""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
from typing import Any

import pytest
import torch

from am_lightning import AMSGD, AMAdamW, loggers
from tests.package.tree import ROOT
from tests.python import PYTHON

ADAMW = (
    "(params, lr=0.001, betas=(0.89, 0.999), eps=1e-08, weight_decay=0.01, *, lambd=0.1, scope='tensor', "
    "maximize=False, foreach=None, capturable=False, fused=None, nonfinite='skip', replica_group=None, "
    "exp_avg_dtype=None)"
)
SGD = (
    "(params, lr=0.001, beta_max=0.9, weight_decay=0.0, *, lambd=0.1, scope='global', decoupled_weight_decay=False, "
    "loss_gap='first_order', maximize=False, foreach=None, nonfinite='skip', replica_group=None)"
)
CLIP = "(optimizer, max_norm, *, in_step=False)"
CALLBACK = (
    "(*, lambd=0.1, beta1_max=None, scope='tensor', per_layer=True, histogram=True, log_every_n_steps=None, "
    "max_consecutive_skips=100)"
)
# Path -> inspect.signature without annotations; None if it is not called.
NAMES: dict[str, str | None] = {
    "am_lightning.__version__": None,
    "am_lightning.AMAdamW": ADAMW,
    "am_lightning.AMSGD": SGD,
    "am_lightning.am_adamw": (
        "(model, lr=0.001, weight_decay=0.01, *, decay_embeddings=True, overrides=None, **options)"
    ),
    "am_lightning.am_sgd": "(model, lr=0.001, weight_decay=0.0, *, decay_embeddings=True, overrides=None, **options)",
    "am_lightning.clip_grad_norm_": CLIP,
    "am_lightning.AdaptiveMemory": CALLBACK,
    "am_lightning.optim.AMAdamW": ADAMW,
    "am_lightning.optim.AMSGD": SGD,
    "am_lightning.optim.clip_grad_norm_": CLIP,
    "am_lightning.optim.reference.AMAdamWReference": (
        "(params, lr=0.001, betas=(0.89, 0.999), eps=1e-08, weight_decay=0.01, *, lambd=0.1, scope='tensor')"
    ),
    "am_lightning.optim.reference.AMSGDReference": (
        "(params, lr=0.001, beta_max=0.9, weight_decay=0.0, *, lambd=0.1, scope='global', decoupled_weight_decay=False)"
    ),
    "am_lightning.lightning.AdaptiveMemory": CALLBACK,
    "am_lightning.lightning.attach": "(fabric, model, optimizer, *, log_every_n_steps=50)",
    "am_lightning.huggingface.attach": "(accelerator, optimizer, *, log_every_n_steps=50)",
    "am_lightning.huggingface.AdaptiveMemoryCallback": "()",
    "am_lightning.huggingface.AMAdamWFactory": "(*arguments, **options)",
    "am_lightning.deepspeed.attach": "(engine)",
    "am_lightning.loggers.attach": "(optimizer, writer, every=50, *, prefix='am')",
    "am_lightning.loggers.Log.remove": "(self)",
    "am_lightning.loggers.StatsReader": "(optimizer, prefix='am')",
    "am_lightning.loggers.StatsReader.read": "(self, step=None)",
    "am_lightning.loggers.StatsReader.scalars": "(self)",
    "am_lightning.loggers.StatsReader.state_dict": "(self)",
    "am_lightning.loggers.StatsReader.load_state_dict": "(self, state_dict)",
    "am_lightning.clients.timm.amadamw": "(params, **options)",
    "am_lightning.clients.timm.amsgd": "(params, momentum=0.9, **options)",
    "am_lightning.clients.timm.main": "()",
    "am_lightning.clients.torchtitan.adaptive_memory": "(config, *, lambd=0.1, beta1_max=None, scope='tensor')",
    "am_lightning.clients.torchtitan.AMOptimizersContainer": "(config, *, model_parts)",
    "am_lightning.clients.torchtitan.MomentumMetrics.log": "(self, *args, extra_metrics=None, **kwargs)",
}

# Attributes of both optimizers; properties and attributes are None.
METHODS: dict[str, str | None] = {
    "step": "(self, closure=None)",
    "momentum": "(self)",
    "last_step_skipped": None,
    "replica_group": None,
    "pipeline_group": None,
    "bind_model": "(self, model)",
    "name_parameters": "(self, named_parameters)",
    "describe": "(self)",
    "zero_grad": "(self, set_to_none=True)",
    "add_param_group": "(self, param_group)",
    "state_dict": "(self)",
    "load_state_dict": "(self, state_dict)",
}
ATTRIBUTES = {"AMAdamW": ("scope", "nonfinite", "exp_avg_dtype"), "AMSGD": ("scope", "nonfinite", "loss_gap")}

# Command -> what its help must name.
COMMANDS: dict[str, tuple[str, ...]] = {
    "recipes": ("list", "cp", "validate", "plan", "report", "fit", "bench"),
    "recipes fit": ("--gpus", "--nodes", "--master-addr", "--master-port", "all"),
    "recipes list": (),
    "recipes cp": ("--force", "NAME", "DIR"),
    "recipes validate": ("CONFIG", "--KEY"),
    "recipes plan": (
        *("CONFIG", "--KEY", "--gpus", "--gpus-per-node", "--gpu", "--peak-tflops", "--memory-gb", "--mfu"),
        *("--node-bandwidth", "--bandwidth", "--json"),
    ),
    "recipes report": ("RUN", "--output"),
    "bench": (
        *("--model", "--dtype", "--device", "--threads", "--repeats", "--weight-decay", "--scope", "--only"),
        *("--without", "--peers", "--others", "--deepspeed", "--tokens", "--cpu-time", "--cold", "--json", "--reduce"),
    ),
    "bench.page": ("RUN", "--to"),
}


def find(path: str) -> Any:
    """Return the object at a dotted path as ``from ... import`` finds it: an attribute before a module of its name."""
    module, *names = path.split(".")
    found: Any = importlib.import_module(module)
    for name in names:
        if inspect.ismodule(found) and not hasattr(found, name):
            found = importlib.import_module(f"{found.__name__}.{name}")
        else:
            found = getattr(found, name)
    return found


def signature_of(found: Any) -> str | None:
    """Return the signature without annotations, or None for what is not called."""
    if not callable(found):
        return None
    signature = inspect.signature(found)
    bare = [param.replace(annotation=inspect.Parameter.empty) for param in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("path", NAMES)
def test_name(path: str) -> None:
    assert signature_of(find(path)) == NAMES[path]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", [AMAdamW, AMSGD])
def test_method(kind: type, name: str) -> None:
    assert signature_of(getattr(kind, name)) == METHODS[name]
    assert (METHODS[name] is None) == isinstance(inspect.getattr_static(kind, name), property)


@pytest.mark.parametrize("kind", [AMAdamW, AMSGD])
def test_attributes(kind: type) -> None:
    optimizer = kind([torch.nn.Parameter(torch.ones(2, device="cpu"))])
    assert [name for name in ATTRIBUTES[kind.__name__] if not hasattr(optimizer, name)] == []


def test_readings() -> None:
    """``huggingface.attach`` returns a reader, and the handle of ``loggers.attach`` has one."""
    log = loggers.attach(AMAdamW([torch.nn.Parameter(torch.ones(2, device="cpu"))]), print, every=7)
    log.readings.read()
    assert log.every == 7 and isinstance(log.readings.scalars(), dict)
    log.remove()


def test_all_lists() -> None:
    """``import *`` gives the same names as before."""
    exported = {
        "am_lightning": ["AMSGD", "AMAdamW", "AdaptiveMemory", "am_adamw", "am_sgd", "clip_grad_norm_"],
        "am_lightning.lightning": ["AdaptiveMemory", "attach"],
        "am_lightning.huggingface": ["AMAdamWFactory", "AdaptiveMemoryCallback", "attach"],
        "am_lightning.optim": ["AMSGD", "AMAdamW", "clip_grad_norm_"],
    }
    for module, names in exported.items():
        assert set(names) <= set(find(module).__all__), module


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    program, *rest = command.split()
    line = [PYTHON, "-m", f"am_lightning.{program}", *rest, "--help"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    words = set(re.findall(r"[\w-]+", done.stdout))
    assert [word for word in COMMANDS[command] if word not in words] == []
