"""`plan`: its numbers checked by hand, its text, its JSON, and what it refuses."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from am_lightning.pretrain.commands.plan import measured
from am_lightning.pretrain.commands.plan.layout import ParallelPlan, make_layout
from am_lightning.pretrain.commands.plan.memory import RESERVE, memory_of
from am_lightning.pretrain.commands.plan.traffic import traffic_of
from am_lightning.pretrain.model.shape import LlamaShape, flops_per_token
from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.run_config import RunConfig, read_run_config
from am_lightning.recipes.__main__ import main
from tests.python import PYTHON
from tests.recipes.test_network import FAMILY

T5_60M, N_60M = FAMILY["60m"]
SHAPE_8B, N_8B = FAMILY["llama-8b"]


@pytest.fixture(autouse=True)
def nothing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "FILE", tmp_path / "measured.json")


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Return `planned(arguments)`: what --json prints."""

    def get(*args: str) -> dict[str, Any]:
        assert main(["plan", args[0], "--json", *args[1:]]) == 0
        out: dict[str, Any] = json.loads(capsys.readouterr().out)
        return out

    return get


@pytest.fixture(scope="module")
def read() -> RunConfig:
    return read_run_config(["--config", "60m"])


@pytest.fixture
def settings(read: RunConfig) -> RunConfig:
    """Return the settings of the 60m, to be changed."""
    return copy.deepcopy(read)


def layout(
    kind: str, gpus: int, *, stage: int = 0, tensor: int = 1, accumulate: int = 1, rows: int = 1
) -> ParallelPlan:
    return ParallelPlan(kind, stage, gpus, min(8, gpus), tensor, accumulate, rows, "bf16-mixed")


def test_the_60m_by_hand(planned: Callable[..., dict[str, Any]]) -> None:
    plan = planned("60m", "--gpus", "8", "--mfu", "0.25")
    assert (plan["parameters"], plan["tensors"], plan["steps"]) == (58_176_000, 75, 10_000)
    assert plan["layout"] == {
        "kind": "ddp",
        "stage": 0,
        "gpus": 8,
        "gpus_per_node": 8,
        "tensor": 1,
        "accumulate": 1,
        "rows": 64,
        "precision": "bf16-mixed",
        "data": 8,
        "nodes": 1,
    }
    assert plan["memory"]["held"]["weights"] == 4 * 58_176_000
    assert plan["memory"]["held"]["AM-AdamW moments"] == 8 * 58_176_000
    # A ring sends 7/8 of the float32 gradients twice; beta_t is reduced from four float64 per tensor in the same way.
    assert plan["traffic"]["data"] == {"all-reduce of gradients": 4 * 58_176_000 * 2 * 7 // 8}
    assert plan["traffic"]["beta"] == 75 * 4 * 8 * 2 * 7 // 8
    assert plan["checkpoint_bytes"] == 12 * 58_176_000
    per_second = 8 * 989e12 * 0.25 / flops_per_token(T5_60M)
    assert plan["speed"]["tokens_per_step"] == 512 * 256
    assert plan["speed"]["tokens_per_second"] == pytest.approx(per_second)
    assert plan["speed"]["days"] == pytest.approx(10_000 * 512 * 256 / per_second / 86400)
    assert plan["speed"]["communication_seconds"] == pytest.approx(4 * 58_176_000 * 1.75 / 450e9, rel=1e-3)
    assert plan["needed"] == plan["memory"]["peak"] + RESERVE
    assert plan["memory"]["peak"] == max(plan["memory"]["totals"].values())
    assert plan["fits"]


def test_zero_by_the_papers_bytes() -> None:
    """Rajbhandari et al. 2020, figure 1: 16 bytes a parameter, of which stages split 12, 14 and 16."""
    for stage, per_parameter in {0: 16, 1: 4 + 12 / 8, 2: 2 + 14 / 8, 3: 16 / 8}.items():
        memory = memory_of(T5_60M, layout("zero", 8, stage=stage), checkpointing=False)
        gradients = memory.moments["optimizer"]["gradients"]
        held = sum(size for name, size in memory.held.items() if name != "reduce bucket")
        assert held + gradients == pytest.approx(per_parameter * N_60M, rel=1e-3)


@pytest.mark.parametrize(("gpus", "tensor"), [(8, 1), (64, 2), (64, 8)])
def test_fsdp_holds_its_share(gpus: int, tensor: int) -> None:
    held = memory_of(SHAPE_8B, layout("fsdp", gpus, tensor=tensor), checkpointing=True).held
    assert sum(held.values()) == pytest.approx(12 * N_8B / gpus, rel=1e-3)


META = """
import sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from am_lightning.pretrain.model.network import build_llama
from am_lightning.pretrain.model.parallelize import split_llama
from am_lightning.pretrain.commands.plan.memory import memory_of
from tests.recipes.test_network import FAMILY
from tests.recipes.test_plan import layout

shape, _ = FAMILY["llama-8b"]
dist.init_process_group("fake", rank=0, world_size=64, store=FakeStore())
for tensor in (1, 2, 8):
    mesh = init_device_mesh("cpu", (64 // tensor, tensor), mesh_dim_names=("data_parallel", "tensor_parallel"))
    with torch.device("meta"):
        model = build_llama(shape)
    split_llama(model, shape, mesh, "bf16-mixed")
    pieces = [param.to_local() for param in model.parameters()]
    assert all(piece.is_meta for piece in pieces)
    real = sum(piece.numel() * piece.element_size() for piece in pieces)
    planned = memory_of(shape, layout("fsdp", 64, tensor=tensor), checkpointing=True).held["weights"]
    print(real, planned)
    assert abs(planned / real - 1) < 1e-3, (tensor, real, planned)
"""


@pytest.mark.slow
def test_the_8b_on_64_gpus_on_the_meta_device() -> None:
    """FSDP2 and tensor parallelism make the real shards, without their bytes."""
    done = subprocess.run(
        [PYTHON, "-c", META], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 3


def test_traffic_by_hand() -> None:
    shape = LlamaShape(8, 16, 2, 2, 32, 4)
    parameters, layers = 2 * 32 * 8 + 2 * (4 * 64 + 3 * 128 + 16) + 8, 2 * (4 * 64 + 3 * 128 + 16)
    got = traffic_of(shape, layout("fsdp", 4, accumulate=3), checkpointing=False)
    assert got.data == {
        "all-gather of weights": 3 * (2 * (parameters + layers) * 3 // 4),
        "reduce-scatter of gradients": 3 * (4 * parameters * 3 // 4),
    }
    assert got.beta == 21 * 32 * 2 * 3 // 4
    assert traffic_of(shape, layout("single", 1), checkpointing=False).total == 0
    # Two GPUs share each layer: a row's stream is 4 tokens x 8 x 2 bytes, of which each sends half.
    got = traffic_of(shape, layout("fsdp", 2, tensor=2), checkpointing=False)
    assert got.data == {}
    assert got.tensor["all-gather of activations"] == got.tensor["reduce-scatter of activations"] == (2 * 4 + 2) * 32


def test_more_gpus_and_checkpointing_take_less() -> None:
    def peak(gpus: int, *, checkpointing: bool) -> int:
        memory = memory_of(SHAPE_8B, layout("fsdp", gpus), checkpointing=checkpointing)
        return memory.total(memory.peak)

    assert peak(64, checkpointing=False) < peak(8, checkpointing=False)
    assert peak(64, checkpointing=True) < 0.6 * peak(64, checkpointing=False)


def test_the_text_says_what_a_user_asks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-8b", "--gpus", "64"]) == 0
    out = capsys.readouterr().out
    for words in (
        "8,030,261,248 parameters in 291 tensors",
        "FSDP over 32 x tensor parallel over 2 = 64 GPUs, 8 nodes of 8, bf16-mixed",
        "32 x 4 micro-batches of 4 rows = 4,194,304 tokens; 38,400 steps = 161 B tokens",
        "all beta_t",
        "days for the run, at an assumed MFU of 0.4",
        "96.4 GB: weights and the two moments",
        "fits        yes",
    ):
        assert words in out, out


def test_what_does_not_fit_is_reported_with_cures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "1b", "--gpus", "1", "--gpu", "L40S", "--trainer.strategy", "auto"]) == 0
    out = capsys.readouterr().out
    assert "fits        NO: " in out
    assert "a larger trainer.accumulate_grad_batches" in out


def test_keys_of_the_configuration_can_be_changed(planned: Callable[..., dict[str, Any]]) -> None:
    args = ["--trainer.strategy", "deepspeed_stage_3", "--trainer.max_steps", "7", "--model.num_layers", "2"]
    plan = planned("60m", "--gpus", "4", *args)
    assert plan == planned("60m", *args, "--gpus", "4") == planned("60m", "--gpus", "4", "--", *args)
    assert (plan["layout"]["kind"], plan["layout"]["stage"], plan["steps"], plan["tensors"]) == ("zero", 3, 7, 21)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("60m",), r"(?s)plan CONFIG --gpus N.*the following arguments are required: --gpus"),
        (("60m", "--gpus", "many"), "argument --gpus: invalid int value: 'many'"),
        (("60m", "--gpus", "8", "--trainer.max_step", "3"), "trainer.max_step"),
        (("60m", "--gpus", "0"), "--gpus is 0; allowed: a whole number >= 1"),
        (("60m", "--gpus", "12"), "--gpus is 12; allowed with --gpus-per-node 8: whole nodes of 8: 8 or 16"),
        (
            ("60m", "--gpus", "6"),
            "batch_size 512 does not divide into 6 groups x 1 .* that fit: 1, 2, 4, 8; .* 510, 516",
        ),
        (("llama-8b", "--gpus", "1"), "--gpus is 1; allowed: a multiple of tensor_parallel_size 2"),
        (("60m", "--gpus", "8", "--mfu", "1.5"), r"--mfu is 1.5; allowed: 0 < value <= 1"),
        (("60m", "--gpus", "8", "--bandwidth", "0"), r"--bandwidth is 0.0; allowed: 0 < value"),
        (("60m", "--gpus", "8", "--gpu", "K80"), "--gpu is 'K80'; allowed: one of A100-40, A100, H100.*--peak-tflops"),
        (
            ("60m", "--gpus", "8", "--gpu", "K80", "--peak-tflops", "8"),
            "--gpu is 'K80'; allowed: .* together with --peak-tflops and --memory-gb",
        ),
        (("60m", "--gpus", "8", "--trainer.precision", "64-true"), "trainer.precision is '64-true'"),
        (("no such", "--gpus", "8"), "no such"),
    ],
)
def test_what_cannot_be_is_refused(args: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *args])
    captured = capsys.readouterr()
    assert re.search(named, f"{stop.value} {captured.err}"), (stop.value, captured.err)
    assert captured.out == ""


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("auto", ("ddp", 0, 1)),
        ("ddp_find_unused_parameters_true", ("ddp", 0, 1)),
        ("fsdp", ("fsdp", 0, 1)),
        ("deepspeed", ("zero", 2, 1)),
        ({"class_path": "lightning.pytorch.strategies.DeepSpeedStrategy", "init_args": {"stage": 3}}, ("zero", 3, 1)),
        (
            {
                "class_path": "lightning.pytorch.strategies.DeepSpeedStrategy",
                "init_args": {"stage": 2, "config": {"zero_optimization": {"stage": 1}}},
            },
            ("zero", 1, 1),
        ),
        ({"class_path": "ModelParallelStrategy", "init_args": {"tensor_parallel_size": 4}}, ("fsdp", 0, 4)),
        ({"class_path": "ModelParallelStrategy"}, ("fsdp", 0, 8)),
    ],
)
def test_strategies(settings: RunConfig, strategy: Any, expected: tuple[str, int, int]) -> None:
    settings.shape = LlamaShape(64, 64, 8, 2, 64, 8)
    settings.config["trainer"]["strategy"] = strategy
    got = make_layout(settings, gpus=8, gpus_per_node=8)
    assert (got.kind, got.stage, got.tensor) == expected


def test_an_unknown_strategy_is_refused(settings: RunConfig) -> None:
    settings.config["trainer"]["strategy"] = "horovod"
    with pytest.raises(RecipeError, match=r"trainer.strategy is 'horovod'; plan knows auto, ddp"):
        make_layout(settings, gpus=1, gpus_per_node=8)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_stage_in_deepspeeds_json_counts(planned: Callable[..., dict[str, Any]], stage: int) -> None:
    engine = Path(__file__).resolve().parents[2] / "recipes" / "configs" / "deepspeed" / f"zero{stage}.json"
    strategy = ["--trainer.strategy", "lightning.pytorch.strategies.DeepSpeedStrategy"]
    plan = planned("60m", "--gpus", "8", *strategy, "--trainer.strategy.config", str(engine))
    assert plan["layout"]["stage"] == stage


@pytest.mark.slow
@pytest.mark.parametrize(("text", "says"), [(None, "No such file"), ("{", "Expecting"), ("[]", "not a JSON object")])
def test_a_wrong_json_of_deepspeed_is_named(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "engine.json"
    if text is not None:
        path.write_text(text)
    strategy = ["--trainer.strategy", "lightning.pytorch.strategies.DeepSpeedStrategy"]
    for command in (["plan", "60m", "--gpus", "8"], ["validate", "60m", "--trainer.default_root_dir", str(tmp_path)]):
        with pytest.raises(SystemExit, match=rf"config is .*engine.json.*{says}"):
            main([*command, *strategy, "--trainer.strategy.config", str(path)])
