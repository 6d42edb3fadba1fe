"""The Kubernetes and SkyPilot files, as far as they can be checked without a cluster."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.python import PYTHON
from tests.recipes.commands import PRETRAIN, RECIPES

from .runs import LAUNCH


def variables_of_cluster_env() -> set[str]:
    return set(re.findall(r'^: "\$\{(\w+)', (LAUNCH / "cluster.env").read_text(), flags=re.MULTILINE))


def kubeflow() -> tuple[dict[str, Any], dict[str, Any]]:
    runtime, job = yaml.safe_load_all((LAUNCH / "kubeflow.yaml").read_text())
    return runtime, job


def skypilot() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def accepted(config: str, *options: str) -> None:
    """Require that pretrain.py accepts these arguments."""
    path = RECIPES / "configs" / f"{config}.yaml"
    command = [PYTHON, str(PRETRAIN), "fit", "--config", str(path), *options, "--print_config"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def test_the_kubeflow_objects_fit_their_api() -> None:
    """The API's models know every field with its type, so that nothing is lost in conversion."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    runtime, job = kubeflow()
    for kind, given in ((models.TrainerV1alpha1TrainingRuntime, runtime), (models.TrainerV1alpha1TrainJob, job)):
        assert without_none(kind.from_dict(given).to_dict()) == given


def test_the_kubeflow_job_is_consistent() -> None:
    runtime, job = kubeflow()
    assert runtime["apiVersion"] == job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    trainer = job["spec"]["trainer"]
    assert trainer["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    [replicated] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    # Kubeflow finds what to change by these two names and the label.
    assert replicated["name"] == container["name"] == "node"
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    env = {item["name"]: item["value"] for item in trainer["env"]}
    assert set(env) <= variables_of_cluster_env()
    assert env["RUN_DIR"].startswith("/runs/")


@pytest.mark.slow
def test_the_kubeflow_command_exists_and_its_arguments_are_known() -> None:
    trainer = kubeflow()[1]["spec"]["trainer"]
    [command] = trainer["command"]
    assert (RECIPES.parent / Path(command).relative_to("/workspace")).is_file()
    config = next(item["value"] for item in trainer["env"] if item["name"] == "CONFIG")
    accepted(config, *trainer["args"])


@pytest.mark.slow
def test_the_skypilot_command_exists_and_its_arguments_are_known() -> None:
    task = skypilot()
    assert set(task["envs"]) <= variables_of_cluster_env()
    assert any(task["envs"]["RUN_DIR"].startswith(f"{mount}/") for mount in task["file_mounts"])
    assert task["num_nodes"] >= 2
    command, *options = task["run"].split()
    assert (RECIPES.parent / command).is_file()
    for script in (task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    accepted(task["envs"]["CONFIG"], *options)
