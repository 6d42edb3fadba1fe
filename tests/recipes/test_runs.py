"""Whole runs through pretrain.py, inside this process."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pretrain
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from am_lightning.pretrain.checkpoints.run_folder import protect_earlier_run
from am_lightning.pretrain.commands.compare import compare
from am_lightning.pretrain.model.lightning_module import LlamaPretraining
from am_lightning.pretrain.runtime.errors import RecipeError

from .commands import RECIPES, arguments, differences, load, run, training_state
from .pages import read_curves

pytestmark = pytest.mark.slow


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path) -> Path:
    """Return a run of 12 steps, started in a folder that is not the repository."""
    root = tmp_path_factory.mktemp("finished") / "run"
    pretrain.main(arguments(root, corpus_folder, 12))
    return root


def test_all_files_are_in_the_run_folder(tmp_path: Path, corpus_folder: Path) -> None:
    for folder in ("home", "temporary", "elsewhere", "run"):
        (tmp_path / folder).mkdir()
    args = arguments(Path("../run"), corpus_folder, 3)
    result = run(args, tmp_path / "elsewhere", HOME=str(tmp_path / "home"), TMPDIR=str(tmp_path / "temporary"))
    assert result.returncode == 0, result.stderr
    made = files(tmp_path) - {"home/.cache/huggingface/hub/version.txt"}  # transformers 4 writes it when it is imported
    made = {name for name in made if not name.startswith("home/.cache/torch_extensions/")}  # the optimizer's C++ loop
    assert {name.split("/")[0] for name in made} == {"run"}
    expected = {f"checkpoints/{name}.ckpt" for name in ("step-000001", "step-000002", "step-000003", "last")}
    assert {f"run/{name}" for name in [*expected, "summary.png", "logs/config.yaml"]} <= made
    assert {name.split("/")[1] for name in made} == {".checkpoints.lock", "checkpoints", "summary.png", "logs", "data"}
    for part in ("validation loss", "tokens per second", f'tensorboard --logdir "{tmp_path / "run" / "logs"}"'):
        assert part in result.stdout
    assert str(tmp_path / "run" / "summary.png") in result.stdout
    assert f'am_lightning.recipes sample "{tmp_path / "run"}" --prompt "def "; or export' in result.stdout


def test_the_speed_is_that_of_the_training(
    tmp_path: Path, corpus_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Validations do not count, also not the one before the first step."""
    many = ["--trainer.num_sanity_val_steps", "-1", "--data.val_rows", "9999", "--data.val_batch_size", "1"]
    pretrain.main(arguments(tmp_path, corpus_folder, 2, *many))
    line = next(line for line in capfd.readouterr().out.splitlines() if "tokens per second" in line)
    assert re.search(r"2 steps, \d+\.\d seconds in this call, [\d ]+ tokens per second", line)


def test_a_run_without_validations_has_the_last_one(tmp_path: Path, corpus_folder: Path) -> None:
    pretrain.main(arguments(tmp_path, corpus_folder, 2, "--trainer.limit_val_batches", "0"))
    curves = read_curves(tmp_path / "logs")
    assert "val/loss" not in curves and curves["final/val_loss"].steps.tolist() == [3]


def test_a_run_of_three_steps_has_a_loss_curve(tmp_path: Path, corpus_folder: Path) -> None:
    pretrain.main(arguments(tmp_path, corpus_folder, 3, "--trainer.log_every_n_steps", "50"))
    loss = read_curves(tmp_path / "logs")["train/loss"]
    assert loss.steps.tolist() == [3]
    assert math.isfinite(loss.values[0])


def test_the_curves_are_in_the_event_file(finished: Path) -> None:
    curves = read_curves(finished / "logs")
    assert curves["train/loss"].steps.tolist() == list(range(1, 13))
    assert curves["train/loss"].values[0] == pytest.approx(math.log(256), abs=0.5)
    assert curves["train/loss"].values[-1] < curves["train/loss"].values[0]
    assert curves["val/loss"].steps.tolist() == [5, 10]
    assert curves["val/perplexity"].values == pytest.approx([math.exp(v) for v in curves["val/loss"].values], rel=1e-4)
    layers = {tag for tag in curves if tag.startswith("am/beta/layer/")}
    names = ("embed_tokens", "layers.0", "layers.1", "norm", "lm_head")
    assert layers == {f"am/beta/layer/{name}{end}" for name in names for end in ("", "/min")}
    assert all((curves[tag].values >= 0).all() and (curves[tag].values <= 0.8 + 1e-6).all() for tag in layers)
    assert curves["lr-AMAdamW/pg1"].values[:2] == pytest.approx([1e-3, 2e-3])  # 15 % of 10 steps are two


def with_manifests(steps: Iterable[int]) -> set[str]:
    """Return the files of checkpoints after `steps` steps."""
    return {f"step-{step:06d}.ckpt{end}" for step in steps for end in ("", ".manifest.json")}


def test_there_are_several_checkpoints_and_last_is_the_newest(finished: Path) -> None:
    folder = finished / "checkpoints"
    assert files(folder) == {"last.ckpt", *with_manifests(range(2, 13, 2))}
    assert load(folder / "last.ckpt")["global_step"] == 12
    assert (folder / "last.ckpt").samefile(folder / "step-000012.ckpt")


@pytest.mark.parametrize("steps", [1, 7, 11])
def test_the_last_step_has_a_checkpoint_whatever_the_interval(tmp_path: Path, corpus_folder: Path, steps: int) -> None:
    pretrain.main(arguments(tmp_path, corpus_folder, steps, "--checkpoint.every_n_train_steps", "4"))
    assert load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == steps
    assert files(tmp_path / "checkpoints") == {"last.ckpt", *with_manifests([*range(4, steps, 4), steps])}


def test_only_the_newest_are_kept(tmp_path: Path, corpus_folder: Path) -> None:
    pretrain.main(arguments(tmp_path, corpus_folder, 10, "--checkpoint.keep", "2"))
    assert files(tmp_path / "checkpoints") == {"last.ckpt", *with_manifests([8, 10])}


def test_the_same_command_gives_the_same_bits(tmp_path: Path, corpus_folder: Path, finished: Path) -> None:
    torch.manual_seed(99)
    pretrain.main(arguments(tmp_path, corpus_folder, 12))
    assert differences(*(training_state(root / "checkpoints" / "last.ckpt") for root in (tmp_path, finished))) == []


def test_a_resume_from_the_middle_gives_the_same_bits(tmp_path: Path, corpus_folder: Path, finished: Path) -> None:
    middle = finished / "checkpoints" / "step-000006.ckpt"
    pretrain.main(arguments(tmp_path, corpus_folder, 12, "--ckpt_path", str(middle)))
    assert differences(*(training_state(root / "checkpoints" / "last.ckpt") for root in (tmp_path, finished))) == []
    assert read_curves(tmp_path / "logs")["train/loss"].steps.tolist() == list(range(7, 13))


def test_a_resume_takes_back_the_points_after_its_checkpoint(tmp_path: Path, corpus_folder: Path) -> None:
    """TensorBoard would keep all points of a step that was logged twice."""
    pretrain.main(arguments(tmp_path, corpus_folder, 8))
    middle = tmp_path / "checkpoints" / "step-000004.ckpt"
    pretrain.main(arguments(tmp_path, corpus_folder, 8, "--ckpt_path", str(middle)))
    events = EventAccumulator(str(tmp_path / "logs"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(8))


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, corpus_folder: Path) -> None:
    pretrain.main(arguments(tmp_path, corpus_folder, 4))
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in (tmp_path / "checkpoints").iterdir()}
    points = read_curves(tmp_path / "logs")["train/loss"].values.tolist()
    pretrain.main(arguments(tmp_path, corpus_folder, 4, "--ckpt_path", "last"))
    assert before == {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in (tmp_path / "checkpoints").iterdir()}
    assert read_curves(tmp_path / "logs")["train/loss"].values.tolist() == points


def test_a_finished_run_can_be_made_longer(tmp_path: Path, corpus_folder: Path) -> None:
    pretrain.main(arguments(tmp_path, corpus_folder, 4))
    pretrain.main(arguments(tmp_path, corpus_folder, 9, "--ckpt_path", "last"))
    assert load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 9
    assert read_curves(tmp_path / "logs")["train/loss"].steps.tolist() == list(range(1, 10))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_accumulation_may_change_on_resume(
    tmp_path: Path, corpus_folder: Path, finished: Path, before: int, after: int
) -> None:
    """The same rows make up the same steps, so the weights agree up to the order of a sum.

    The odd step matters: the checkpoint's micro-batches are no whole number of the new steps.
    """
    key = "--trainer.accumulate_grad_batches"
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    pretrain.main(arguments(whole, corpus_folder, 12, key, str(before), "--checkpoint.every_n_train_steps", "5"))
    middle = whole / "checkpoints" / "step-000005.ckpt"
    pretrain.main(arguments(resumed, corpus_folder, 12, key, str(after), "--ckpt_path", str(middle)))
    ours, reference = (load(root / "checkpoints" / "last.ckpt") for root in (resumed, finished))
    assert ours["global_step"] == 12
    for name, weight in reference["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], weight, rtol=1e-4, atol=1e-5)


def test_options_of_the_optimizer_may_change_on_resume(tmp_path: Path, corpus_folder: Path, finished: Path) -> None:
    options = ["--model.optimizer.lr", "1e-5", "--model.optimizer.betas", "[0.7, 0.9]", "--model.weight_decay", "0.3"]
    middle = finished / "checkpoints" / "step-000006.ckpt"
    pretrain.main(arguments(tmp_path, corpus_folder, 8, "--ckpt_path", str(middle), *options))
    groups = load(tmp_path / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"]
    assert [(group["weight_decay"], group["betas"], group["initial_lr"]) for group in groups] == [
        (0.3, (0.7, 0.9), 1e-5),
        (0.0, (0.7, 0.9), 1e-5),
    ]
    assert read_curves(tmp_path / "logs")["lr-AMAdamW/pg1"].values.max() <= 1e-5


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--model.optimizer.lr", "-1"], "error: model.optimizer: Invalid learning rate: -1"),
        (["--model.optimizer", "torch.optim.SGD"], "error: model.optimizer: torch.optim.sgd.SGD is not exactly"),
        (["--trainer.max_steps", "0"], "error: trainer.max_steps is 0"),
        (["--trainer.gradient_clip_val", "-1"], "error: trainer.gradient_clip_val is -1; allowed: 0 <= value"),
        (["--trainer.accumulate_grad_batches", "0"], "error: trainer.accumulate_grad_batches is 0"),
        pytest.param(
            ["--trainer.strategy", "deepspeed"],
            "error: trainer.strategy is 'deepspeed'; allowed: other strategies",
            marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
        ),
    ],
)
def test_a_typing_error_leaves_the_earlier_run_where_it_is(
    tmp_path: Path, corpus_folder: Path, wrong: list[str], says: str
) -> None:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "config.yaml").write_text("of a run")
    done = run([*arguments(tmp_path / "run", corpus_folder, 2), *wrong], tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(says) and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "run" / "logs" / "config.yaml").read_text() == "of a run"


def test_an_earlier_run_that_cannot_be_moved_stays(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "config.yaml").touch()
    (tmp_path / "earlier").touch()
    with pytest.raises(RecipeError, match=r"cannot write .*/earlier/1: Not a directory\. Choose another folder"):
        protect_earlier_run(tmp_path, tmp_path / "checkpoints", None)
    assert (tmp_path / "logs" / "config.yaml").exists()


def test_a_new_run_moves_the_earlier_one_away(tmp_path: Path, corpus_folder: Path) -> None:
    pretrain.main(arguments(tmp_path, corpus_folder, 5))
    pretrain.main(arguments(tmp_path, corpus_folder, 3))
    assert load(tmp_path / "earlier" / "1" / "checkpoints" / "last.ckpt")["global_step"] == 5
    assert (tmp_path / "earlier" / "1" / "summary.png").exists()
    assert load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 3
    assert read_curves(tmp_path / "logs")["train/loss"].steps.tolist() == [1, 2, 3]
    pretrain.main(arguments(tmp_path, corpus_folder, 3, "--trainer.fast_dev_run", "true"))  # writes nothing
    assert load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 3
    earlier = ["--ckpt_path", str(tmp_path / "earlier" / "1" / "checkpoints" / "last.ckpt")]
    with pytest.raises(SystemExit, match=r"^error: --ckpt_path .* is not in .*, which holds the checkpoints of"):
        pretrain.main(arguments(tmp_path, corpus_folder, 6, *earlier))
    with pytest.raises(SystemExit, match=r"nowhere does not exist"):
        pretrain.main(arguments(tmp_path, Path("nowhere"), 3))
    assert load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 3


@pytest.mark.parametrize(
    ("ckpt_path", "warmup", "expected"),
    [("a.ckpt", 0.0, (None, 0.05)), ("last", 0.02, ("last", 0.05)), (None, 0.15, (None, 0.15))],
)
def test_a_baseline_begins_at_step_0_or_resumes_and_has_no_shorter_warmup(
    tmp_path: Path, ckpt_path: str | None, warmup: float, expected: tuple[str | None, float]
) -> None:
    """`--compare true` trains it; a checkpoint that is given is of the AM run."""
    model = {"optimizer": {"class_path": "am_lightning.AMAdamW"}, "warmup_fraction": warmup}
    config: dict[str, Any] = {"model": model, "data": {"cache_dir": None}, "checkpoint": {}}
    config |= {"trainer": {"default_root_dir": str(tmp_path)}, "ckpt_path": ckpt_path}
    seen = []

    def train(baseline: dict[str, Any]) -> None:
        seen.append((baseline["ckpt_path"], baseline["model"]["warmup_fraction"]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(SimpleNamespace(root=tmp_path), config, train)  # type: ignore[arg-type]
    assert seen == [expected]


def test_a_run_with_another_runs_configuration_leaves_its_checkpoints(
    tmp_path: Path, corpus_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    pretrain.main(arguments(first, corpus_folder, 2, "--checkpoint.keep", "1"))
    before = {path: path.read_bytes() for path in (first / "checkpoints").iterdir()}
    again = ["fit", "--config", str(first / "logs" / "config.yaml"), "--trainer.max_steps", "1"]
    again += ["--trainer.default_root_dir", str(second)]
    pretrain.main(again)
    assert f"{second / 'checkpoints' / 'last.ckpt'}\n" in capsys.readouterr().out
    assert load(second / "checkpoints" / "last.ckpt")["global_step"] == 1
    with pytest.raises(SystemExit, match=r"checkpoint\.dirpath: .* holds the checkpoints of another run\. Choose"):
        pretrain.main([*again, "--checkpoint.dirpath", str(first / "checkpoints")])
    assert {path: path.read_bytes() for path in (first / "checkpoints").iterdir()} == before


SGD = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1", "--trainer.callbacks", "null"]


@pytest.mark.parametrize(
    "wrong", [["--data.seed", "3"], ["--model.hidden_size", "64"], ["--model.optimizer.lr", "-1"], SGD]
)
def test_a_refused_resume_leaves_the_configuration(tmp_path: Path, finished: Path, wrong: list[str]) -> None:
    config = finished / "logs" / "config.yaml"
    before = config.read_bytes()
    again = ["fit", "--config", str(config), "--trainer.max_steps", "13", "--ckpt_path", "last"]
    with pytest.raises(SystemExit, match=r"^error: [^\n]+$"):
        pretrain.main([*again, *wrong])
    assert config.read_bytes() == before


def test_a_checkpoint_scores_the_same_on_its_own(
    finished: Path, corpus_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = files(finished)
    args = arguments(finished, corpus_folder, 12, "--ckpt_path", "last", command="validate")
    pretrain.main(args)
    line = next(line for line in capfd.readouterr().out.splitlines() if "validation loss" in line)
    module = LlamaPretraining.load_from_checkpoint(finished / "checkpoints" / "last.ckpt")
    assert module.model.config.hidden_size == 32
    assert "on 16 held-out rows" in line
    assert files(finished) == before


def test_tensorboard_gets_the_overlay_and_no_foreign_steps(finished: Path) -> None:
    events = EventAccumulator(str(finished / "logs"), size_guidance={"scalars": 0})
    events.Reload()
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith(("validate/", "sanity"))]
    assert {"throughput/tokens", "throughput/tokens_per_second"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--data.batch_size", "7", "--trainer.accumulate_grad_batches", "2"], r"data.batch_size 7 is not divisible"),
        (["--data.batch_size", "0"], r"data.batch_size is 0; allowed"),
        (["--data.val_percent", "0"], r"data.val_percent is 0.0; allowed"),
        (["--data.seq_len", "9"], None),
        (["--model.vocab_size", "100"], r"model.vocab_size is 100; allowed: >= 256"),
        (["--model.hidden_size", "33"], r"model.hidden_size is 33; allowed: a multiple of 2 \* num_heads = 4"),
        (["--trainer.max_steps", "-1"], r"trainer.max_steps is -1; allowed"),
        (["--threads", "0"], r"threads is 0; allowed"),
        (["--checkpoint.keep", "0"], r"checkpoint.keep is 0; allowed"),
        (["--ckpt_path", "gone.ckpt"], r"--ckpt_path gone.ckpt: there is no such file"),
        (["--ckpt_path", str(RECIPES)], r"--ckpt_path .* is not a checkpoint of this program; allowed"),
        (["--trainer.accelerator", "gpu"], r"trainer: No supported gpu backend found"),
        (["--trainer.num_nodes", "0"], r"trainer: `num_nodes` must be a positive integer"),
        (["--trainer.val_check_interval", "0"], r"trainer.val_check_interval is 0; allowed: > 0"),
        (["--trainer.check_val_every_n_epoch", "1"], r"trainer.val_check_interval is 5; allowed: 1 to 3, the micro-b"),
        (
            ["--trainer.check_val_every_n_epoch", "1", "--trainer.limit_train_batches", "0.7"],
            r"trainer.val_check_interval is 5; allowed: 1 to 2, the micro-b",
        ),
        (["--trainer.check_val_every_n_epoch", "0"], r"trainer.check_val_every_n_epoch is 0; allowed: a whole number"),
        (["--data.source", "gone"], r"data.source gone does not exist"),
        (["--model.optimizer.init_args.lrr", "1"], None),
    ],
)
def test_a_wrong_setting_is_named(
    tmp_path: Path, corpus_folder: Path, capfd: pytest.CaptureFixture[str], extra: list[str], says: str | None
) -> None:
    with pytest.raises(SystemExit, match=says) as caught:
        pretrain.main(arguments(tmp_path, corpus_folder, 3, *extra))
    if says is None:  # the parser's own errors are a few lines, without a list of all settings
        errors = capfd.readouterr().err
        assert extra[0].rsplit(".", 1)[1] in errors
        assert len(errors.splitlines()) < 8
        assert caught.value.code == 2
    assert not (tmp_path / "checkpoints").exists()


def test_another_text_is_refused_on_resume(tmp_path: Path, corpus_folder: Path) -> None:
    pretrain.main(arguments(tmp_path / "run", corpus_folder, 2))
    other = tmp_path / "other"
    other.mkdir()
    for number in range(60):
        (other / f"{number}.txt").write_text("another text " * 50)
    with pytest.raises(SystemExit, match=r"trained on another text than .*bytes-\w+ holds"):
        pretrain.main(arguments(tmp_path / "run", other, 4, "--ckpt_path", "last"))
    with pytest.raises(SystemExit, match=r"data.batch_size is 16, the checkpoint was trained with 8"):
        pretrain.main(arguments(tmp_path / "run", corpus_folder, 4, "--ckpt_path", "last", "--data.batch_size", "16"))


def test_a_broken_last_checkpoint_falls_back_to_the_one_before(tmp_path: Path, corpus_folder: Path) -> None:
    pretrain.main(arguments(tmp_path, corpus_folder, 5))
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"last.ckpt is broken.*resuming from .*step-000004.ckpt"):
        pretrain.main(arguments(tmp_path, corpus_folder, 5, "--ckpt_path", "last"))
    assert load(last)["global_step"] == 5


def test_a_broken_token_file_is_named(tmp_path: Path, corpus_folder: Path) -> None:
    pretrain.main(arguments(tmp_path, corpus_folder, 1))
    tokens = next((tmp_path / "data").rglob("train-*.bin"))
    tokens.write_bytes(tokens.read_bytes()[:-10])
    with pytest.raises(SystemExit, match=rf"{tokens} is broken.*Delete {tokens.name}"):
        pretrain.main(arguments(tmp_path, corpus_folder, 1))
