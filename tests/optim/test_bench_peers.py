"""python -m am_lightning.bench --peers: other optimizers step on the tensors that ours step on."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from am_lightning.bench.__main__ import main, parse
from am_lightning.bench.comparison import run
from am_lightning.bench.contenders import make_contenders, make_parameters
from am_lightning.bench.measure import measure
from am_lightning.bench.peers import LR, PEERS, Peer, make_peers
from am_lightning.bench.table import rows_of
from tests.python import COLD

CPU, ROOT = torch.device("cpu"), Path(__file__).resolve().parents[2]
SMALL = ["--model", "tensors:4x50", "--repeats", "1"]
PACKAGES = [peer for peer in PEERS if peer.package != "torch"]


class Stranger(torch.optim.AdamW):
    """Replace the package if it is not installed, and print its arguments, as some packages do."""

    def __init__(self, params: list[torch.nn.Parameter], **options: Any) -> None:
        print("Using decoupled weight decay")
        super().__init__(params, lr=LR, weight_decay=options["weight_decay"])


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    for peer in PACKAGES:
        if find_spec(peer.path[0]) is None:
            module = ModuleType(peer.path[0])
            setattr(module, peer.path[1], Stranger)
            monkeypatch.setitem(sys.modules, peer.path[0], module)


def test_what_is_not_installed_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for peer in PACKAGES:
        monkeypatch.setitem(sys.modules, peer.path[0], None)  # as if not installed
    report = run(parse([*SMALL, "--peers", "--only", "RAdam", *(peer.name for peer in PACKAGES)]))
    assert {row["optimizer"] for row in report["rows"]} == {"AdamW fused", "RAdam foreach"}
    assert report["left out"].keys() == {peer.name for peer in PACKAGES}
    printed = capsys.readouterr().err
    for peer in PACKAGES:
        assert f"{peer.name} is left out: needs {peer.package} (" in printed
    assert printed.count("pip install 'am-lightning[studies]'") == len(PACKAGES)
    assert run(parse([*SMALL, "--peers", "--only", "fused", "--without", "Prodigy"]))["left out"].keys() == {
        peer.name for peer in PACKAGES if peer.name != "Prodigy"
    }


@pytest.mark.usefixtures("strangers")
@pytest.mark.parametrize("option", ["--peers", "--others"])
def test_a_row_for_each(option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = [peer.name for peer in PEERS]
    monkeypatch.setattr(
        sys, "argv", ["bench", *SMALL, option, "--json", "--only", "AdamW default", "AdamW foreach", *names]
    )
    main()
    report = json.loads(capsys.readouterr().out)  # nothing else was printed there
    rows = {row["optimizer"]: row for row in report["rows"]}
    adamw = {"AdamW fused", "AdamW default", "AdamW foreach"}
    assert rows.keys() == adamw | {"AMAdamW default", "AMAdamW foreach", *names} and report["left out"] == {}
    assert all(row["ms"] > 0 and row["make s"] > 0 and row["x same"] > 0 for row in rows.values())
    assert [row["ms"] for row in report["rows"]] == sorted(row["ms"] for row in report["rows"])
    more = {"AMAdamW default": 11, "AMAdamW foreach": 11, "Prodigy": 13, "DAdaptAdam": 9}
    words = {name: row["limit"] * 7 for name, row in rows.items()}
    assert words == pytest.approx(dict.fromkeys(rows, 7) | more)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.package)
def test_a_peer_steps_with_our_options_and_leaves_the_gradients(peer: Peer) -> None:
    """The real package makes a few steps with lr 1e-6 and decay, on the same gradients every time."""
    pytest.importorskip(peer.path[0])
    params = make_parameters([(64, 3), (9,)], torch.float32, CPU)
    begun, gradients = [p.detach().clone() for p in params], [p.grad.clone() for p in params]
    (seen,), failed = measure([peer.make(params, 0.1)], 3, CPU)
    assert not failed and seen.contender.kernels() == ("torch.optim" if peer.package == "torch" else peer.path[0])
    for param, before, gradient in zip(params, begun, gradients, strict=True):
        assert torch.equal(param.grad, gradient)
        assert 0 < (param.detach() - before).abs().max() < 10 * LR  # 7 steps
    assert all(group["weight_decay"] == 0.1 for group in seen.contender.optimizer.param_groups)


def test_peers_whose_moments_are_adamws_share_them() -> None:
    params = make_parameters([(64, 3), (9,)], torch.float32, CPU)
    contenders, _ = make_contenders(params, decay=0.1, scope="tensor", device=CPU)
    peers, missing = make_peers(params, decay=0.1)
    assert missing.keys() == {peer.name for peer in PACKAGES if find_spec(peer.path[0]) is None}
    wanted = [*(c for c in contenders if c.name in ("AdamW default", "AMAdamW default")), *peers]
    measured, failed = measure(wanted, 1, CPU)
    assert not failed
    states = {m.contender.name: m.contender.optimizer.state[params[0]] for m in measured}
    for name, state in states.items():
        own = name in ("Prodigy", "DAdaptAdam")
        assert (state["exp_avg_sq"] is states["AdamW default"]["exp_avg_sq"]) == (not own), name
    rows = {str(row["optimizer"]): row for row in rows_of(measured, None)}
    assert rows["AMAdamW default"]["x same"] == pytest.approx(measured[1].seconds[0] / measured[0].seconds[0])


def test_words_of_half_precision() -> None:
    """optimi adds a compensation in half precision, which is read and written."""
    pytest.importorskip("optimi")
    params = make_parameters([(10,)], torch.bfloat16, CPU)
    (optimi,) = (peer.make(params, 0.1) for peer in PEERS if peer.package == "torch-optimi")
    optimi.step()
    assert optimi.bytes_moved == 10 * 2 * 9 and optimi.optimizer.state[params[0]]["kahan_comp"].shape == (10,)


@pytest.mark.slow
def test_deepspeeds_own_beside_ours() -> None:
    """DeepSpeed is loaded in a separate process, because the optimizer then searches for engines."""
    pytest.importorskip("deepspeed")
    command = [COLD, "-m", "am_lightning.bench", *SMALL, "--deepspeed", "--json", "--only", "DeepSpeed", "AMAdamW def"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout[done.stdout.index("{") :])  # DeepSpeed prints while it builds
    rows = {row["optimizer"]: row for row in report["rows"]}
    assert rows.keys() == {"AdamW fused", "AMAdamW default", "DeepSpeedCPUAdam"}
    assert rows["DeepSpeedCPUAdam"]["limit"] == 1.0 and "C++ loop" in rows["AMAdamW default"]["kernels"]
