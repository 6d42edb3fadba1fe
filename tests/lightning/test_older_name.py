"""``pytorch_lightning``, alone and beside ``lightning``: this folder's tests again, and which name is imported when."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.lightning.older_name import HIDE, ROOT, copy_renamed, run
from tests.python import PYTHON

HERE = "tests/lightning"
FILES = sorted(path.name for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__))
MODES = [pytest.param(True, marks=pytest.mark.slow, id="alone"), pytest.param(False, id="beside the newer")]
STRATEGIES = f"{HERE}/test_strategies.py::test_clipping_by_norm"


@pytest.fixture(scope="module")
def renamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_renamed(tmp_path_factory.mktemp("older") / "checkout")


@pytest.mark.parametrize("only_older", MODES)
def test_a_trainer_of_the_older_name(renamed: Path, only_older: bool) -> None:
    """Curves, layers and the histogram, a resume, clipping, refusals, Fabric."""
    run(
        renamed,
        f"{HERE}/test_callback.py::test_curves_in_tensorboard_and_csv_are_the_momentum",
        f"{HERE}/test_callback.py::test_resume_is_bitwise_the_unbroken_run",
        f"{HERE}/test_clipping.py::test_each_optimizer_by_its_own_norm",
        f"{HERE}/test_lifecycle.py::test_after_a_fit_that_raised_the_next_is_converted",
        f"{HERE}/test_fabric.py::test_two_optimizers_and_skipped_steps",
        only_older=only_older,
    )


@pytest.mark.slow
@pytest.mark.parametrize("only_older", MODES)
def test_strategies_of_the_older_name(renamed: Path, only_older: bool) -> None:
    """Clipping under DDP and FSDP1, and a distributed checkpoint of AdamW under model parallel."""
    placed = [f"{STRATEGIES}[{where}-2]" for where in ("ddp", "fsdp1", "fsdp2")]
    switched = f"{HERE}/test_checkpoints.py::test_a_run_of_adamw_resumes_with_the_callback[fsdp2-2to2]"
    run(renamed, *placed, switched, only_older=only_older)


@pytest.mark.slow
@pytest.mark.parametrize("test", ["test_cli.py::test_command_line", "test_ddp.py"])
def test_programs_of_the_older_name(renamed: Path, test: str) -> None:
    """LightningCLI with the callback's class path, and DDP under Lightning's own launcher."""
    run(renamed, f"{HERE}/{test}", only_older=True)


@pytest.mark.nightly("older name")
@pytest.mark.parametrize("file", FILES)
def test_this_folder_under_the_older_name(renamed: Path, file: str) -> None:
    run(renamed, f"{HERE}/{file}", only_older=True)


# The imports of a program, and the package whose classes ours then are.
IMPORTS = {
    "the newer alone": """
        import lightning.pytorch as newer
        from am_lightning import AdaptiveMemory
        assert isinstance(AdaptiveMemory(), newer.Callback)
        assert not {"pytorch_lightning", "lightning_fabric"} & set(sys.modules)
    """,
    "the older alone": """
        unload("lightning")
        import pytorch_lightning as older
        from am_lightning import AdaptiveMemory
        assert issubclass(AdaptiveMemory, older.Callback)
        assert "lightning" not in sys.modules
    """,
    "nothing, and only the older is installed": """
        hide("lightning")
        from am_lightning import AdaptiveMemory
        import pytorch_lightning as older
        assert issubclass(AdaptiveMemory, older.Callback)
    """,
    "ours, then the older": """
        from am_lightning import AdaptiveMemory
        import pytorch_lightning as older
        callback = AdaptiveMemory()
        assert callback in older.Trainer(callbacks=callback, logger=False, barebones=False).callbacks
        assert isinstance(callback, older.Callback) and isinstance(callback, lightning.pytorch.Callback)
        assert isinstance(pickle.loads(pickle.dumps(callback)), AdaptiveMemory)
    """,
    "ours, then the older, whose LightningCLI looks a class path up": """
        from am_lightning import AdaptiveMemory as first
        import pytorch_lightning as older
        assert not issubclass(first, older.Callback)
        from am_lightning import AdaptiveMemory
        assert AdaptiveMemory is first and issubclass(AdaptiveMemory, older.Callback)
    """,
    "ours, then the older, and a class of one's own": """
        from am_lightning import AdaptiveMemory
        import pytorch_lightning as older
        class Own(AdaptiveMemory):
            pass
        assert issubclass(Own, older.Callback) and issubclass(Own, lightning.pytorch.Callback)
    """,
    "both, and an error": """
        import pytorch_lightning, lightning_fabric.utilities.exceptions as older
        import lightning.fabric.utilities.exceptions as newer
        from am_lightning.lightning.compat import MisconfigurationException
        error = MisconfigurationException("text")
        assert isinstance(error, older.MisconfigurationException) and isinstance(error, newer.MisconfigurationException)
        assert (str(error), type(error).__name__) == ("text", "MisconfigurationException")
    """,
    "lightning_fabric, and nothing else is installed": """
        hide("lightning", "pytorch_lightning")
        import torch, lightning_fabric
        from am_lightning import AdaptiveMemory, am_adamw
        from am_lightning.lightning import attach
        fabric, net = lightning_fabric.Fabric(accelerator="cpu", devices=1), torch.nn.Linear(2, 2)
        attach(fabric, *fabric.setup(net, am_adamw(net)))
        try:
            AdaptiveMemory()
        except ImportError as error:
            assert "pip install 'am-lightning[lightning]'" in str(error)
        else:
            raise AssertionError
    """,
}


@pytest.mark.parametrize("imported", IMPORTS)
def test_a_name_is_imported_only_where_it_is_used(imported: str) -> None:
    lines = [line.removeprefix("        ") for line in IMPORTS[imported].splitlines()]
    code = "\n".join([HIDE, "import pickle, lightning.pytorch", *lines])
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
