"""Every launcher starts the same program with the same arguments on all ranks, and names what is missing.

The real launchers start a small program that records its arguments, so that this takes seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port
from tests.recipes.commands import RECIPES

from .namespaces import Node
from .runs import LAUNCH, variables

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
ACCELERATE = sorted((LAUNCH / "accelerate").glob("*.yaml"))

PROBE = """
import json, os, sys
names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"]
names += [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]
said = {"argv": sys.argv[1:], "env": {name: os.environ.get(name) for name in names}}
with open(os.path.join(os.environ["RUN_DIR"], "rank" + os.environ["RANK"] + ".json"), "w") as file:
    json.dump(said, file)
"""


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    path = tmp_path / "probe.py"
    path.write_text(PROBE)
    return path


def launch(script: str, root: Path, *args: str, **others: str) -> subprocess.CompletedProcess[str]:
    env = variables(root, **{"NODES": "1", "GPUS_PER_NODE": "2", "MASTER_PORT": str(free_port()), **others})
    return subprocess.run([str(LAUNCH / script), *args], env=env, capture_output=True, text=True, timeout=120)


def said(root: Path) -> list[dict[str, Any]]:
    """Return what every rank recorded; all ranks must be there with the same arguments."""
    ranks = [json.loads(path.read_text()) for path in sorted(root.glob("rank*.json"))]
    assert [rank["env"]["RANK"] for rank in ranks] == [str(i) for i in range(len(ranks))]
    for rank in ranks:
        assert rank["env"]["WORLD_SIZE"] == str(len(ranks))
        assert rank["argv"] == ranks[0]["argv"]
    return ranks


def arguments(root: Path, nodes: int, processes: int, *others: str) -> list[str]:
    config = RECIPES / "configs" / "laptop.yaml"
    expected = ["fit", "--config", str(config), "--ckpt_path", "last", "--trainer.default_root_dir", str(root)]
    return [*expected, "--trainer.num_nodes", str(nodes), "--trainer.devices", str(processes), *others]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["torchrun.sh", "accelerate.sh", "deepspeed.sh"])
def test_a_launcher_starts_every_rank(script: str, probe: Path, tmp_path: Path) -> None:
    if script == "deepspeed.sh":
        pytest.importorskip("deepspeed")
    root = tmp_path / "a run"
    done = launch(script, root, "--trainer.max_steps", "7", PROGRAM=str(probe))
    assert done.returncode == 0, done.stderr
    ranks = said(root)
    assert len(ranks) == 2
    assert ranks[0]["argv"] == arguments(root, 1, 2, "--trainer.max_steps", "7")


HOSTILE = "a b' \" $(touch X) `touch X`; touch X & * \\\\ \n--{} %s $HOME"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["torchrun.sh", "accelerate.sh", "deepspeed.sh"])
def test_no_value_is_executed_or_split(script: str, probe: Path, tmp_path: Path) -> None:
    """The recipe's path, the run's folder and the program's options reach every rank unchanged."""
    if script == "deepspeed.sh":
        pytest.importorskip("deepspeed")
    config, root = tmp_path / f"-{HOSTILE}.yaml", tmp_path / f"-{HOSTILE}"
    config.write_text("trainer: {}\n")
    words = ["--data.source", HOSTILE, "", "-", f"--data.text_field={HOSTILE}"]
    done = launch(script, root, *words, PROGRAM=str(probe), CONFIG=str(config))
    assert done.returncode == 0, done.stderr
    expected = arguments(root, 1, 2, *words)
    expected[expected.index("--config") + 1] = str(config)
    assert said(root)[0]["argv"] == expected
    assert not [path for folder in (tmp_path, root, Path.cwd()) for path in folder.glob("X*")]


@pytest.mark.nightly("network namespaces")
@pytest.mark.parametrize("script", ["torchrun.sh", "accelerate.sh", "deepspeed.sh"])
def test_two_nodes_find_each_other_by_number(
    script: str, probe: Path, tmp_path: Path, nodes: tuple[Node, Node]
) -> None:
    """The rendezvous is static, and DeepSpeed needs no ssh."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{node.address} slots=1\n" for node in nodes))
    others = {"MASTER_ADDR": nodes[0].address, "RDZV": "static", "HOSTFILE": str(hostfile), "PROGRAM": str(probe)}
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    started = [
        node.start([str(LAUNCH / script)], variables(tmp_path, NODE_RANK=str(i), **others), logs[i])
        for i, node in enumerate(nodes)
    ]
    assert [process.wait(120) for process in started] == [0, 0], [log.read_text() for log in logs]
    ranks = said(tmp_path)
    assert len(ranks) == 2
    assert ranks[0]["argv"] == arguments(tmp_path, 2, 1)
    assert {rank["env"]["MASTER_ADDR"] for rank in ranks} == {nodes[0].address}


@pytest.mark.nightly("network namespaces")
def test_an_elastic_run_is_told_how_many_nodes_came(probe: Path, tmp_path: Path, nodes: tuple[Node, Node]) -> None:
    """One of at most two nodes is enough, and only one starts."""
    others = {"MASTER_ADDR": nodes[0].address, "RDZV_CONF": "last_call_timeout=1", "PROGRAM": str(probe)}
    env = variables(tmp_path, MIN_NODES="1", **others)
    assert nodes[0].start([str(LAUNCH / "torchrun.sh")], env, tmp_path / "log").wait(120) == 0
    assert [rank["argv"] for rank in said(tmp_path)] == [arguments(tmp_path, 1, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["kubeflow", "skypilot"])
def test_the_sizes_of_kubernetes_and_skypilot_win(sizes: str, probe: Path, tmp_path: Path) -> None:
    """Their controllers set these variables for a pod or a machine. Here it is one node of two GPUs."""
    port = str(free_port())
    kubeflow = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1"}
    skypilot = {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "2", "SKYPILOT_NODE_RANK": "0"}
    given = {
        "kubeflow": {**kubeflow, "PET_MASTER_PORT": port},
        "skypilot": {**skypilot, "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2"},
    }
    done = launch("torchrun.sh", tmp_path, PROGRAM=str(probe), NODES="3", GPUS_PER_NODE="5", **given[sizes])
    assert done.returncode == 0, done.stderr
    assert said(tmp_path)[0]["argv"] == arguments(tmp_path, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("config", ACCELERATE, ids=lambda path: path.stem)
def test_an_accelerate_configuration_reaches_the_program(config: Path, probe: Path, tmp_path: Path) -> None:
    if config.stem == "deepspeed":
        pytest.importorskip("deepspeed")
    done = launch("accelerate.sh", tmp_path, PROGRAM=str(probe), ACCELERATE_CONFIG=str(config))
    assert done.returncode == 0, done.stderr
    [env, _] = [rank["env"] for rank in said(tmp_path)]
    assert env["ACCELERATE_MIXED_PRECISION"] == "bf16"
    fsdp2 = {"FSDP_VERSION": "2", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}
    wanted = {"ddp": {}, "fsdp2": fsdp2, "deepspeed": {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}}
    assert wanted[config.stem].items() <= env.items()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"NODES": "two"}, "NODES is 'two'; allowed: a whole number >= 1"),
        ({"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE is '0'; allowed: a whole number >= 1"),
        ({"MIN_NODES": "2"}, "MIN_NODES is 2; allowed: at most NODES = 1"),
        ({"NODES": "2"}, "NODES is 2: set MASTER_ADDR to the first machine, as the others see it"),
        ({"NODES": "2", "MASTER_ADDR": "no.such.host.invalid", "RESOLVE_TIMEOUT": "0"}, "cannot resolve"),
        ({"NODES": "2", "MASTER_ADDR": "127.0.0.1", "RDZV": "static"}, "RDZV is static: set NODE_RANK"),
        ({"RDZV": "mpi"}, "RDZV is 'mpi'; allowed: c10d, static"),
        ({"CONFIG": "60n"}, "config is '60n': no such file, and no recipe"),
        ({"PROGRAM": "pretrain.pi"}, "PROGRAM is 'pretrain.pi': there is no such file"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_sizes_are_refused(given: dict[str, str], message: str, tmp_path: Path) -> None:
    done = launch("torchrun.sh", tmp_path, **given)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_environment_wins_over_cluster_env() -> None:
    """A launcher uses every variable of cluster.env."""
    lines = [line for line in (LAUNCH / "cluster.env").read_text().splitlines() if line.startswith(": ")]
    names = [line.split("{")[1].split("=")[0].rstrip(":") for line in lines]
    code = "\n".join(path.read_text() for path in SCRIPTS)
    for name in names:
        assert f"${name}" in code or f"${{{name}" in code, name
    script = f'NODES=5; source "{LAUNCH}/cluster.env"; echo $NODES $MIN_NODES $RDZV'
    done = subprocess.run(["bash", "-euc", script], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.stdout.split() == ["5", "5", "c10d"]


def test_the_scripts_are_sound() -> None:
    for script in SCRIPTS:
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
        assert os.access(script, os.X_OK) or script.name in ("common.sh", "slurm.sbatch"), script
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(
        ["shellcheck", "--external-sources", "--source-path", str(RECIPES.parent), *map(str, SCRIPTS)],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout
