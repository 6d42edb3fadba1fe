"""fused=True on the CPU: the C++ loop and torch.compile against float64, bitwise where equal bits are promised."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing._internal.two_tensor import TwoTensor

from am_lightning import AMAdamW
from am_lightning.optim.kernels import registry
from am_lightning.optim.kernels.cpu import build as compiler
from am_lightning.optim.kernels.triton.check import Kind
from tests.optim.harness import (
    SCOPES,
    Bowl,
    Twin,
    assert_bitwise,
    build,
    compile_on_cpu,
    make_oracle,
    named_params,
    run_bowl,
    snapshot,
)
from tests.optim.test_every_step import RATES
from tests.optim.test_layouts import scatter_strides, with_odd_strides
from tests.python import COLD

ROOT = Path(__file__).resolve().parents[2]
# Less than a tile; tiles and a remainder; blocks and a remainder; one element; none.
SHAPES = [(33, 7), (40_001,), (), (0,), (1024,), (3, 0, 2), (16_385,)]
IMPLEMENTATIONS = ["cpp", pytest.param("compile", marks=pytest.mark.slow)]


@pytest.fixture
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "compile":
        compile_on_cpu(monkeypatch)
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
cpp = pytest.mark.parametrize("implementation", ["cpp"], indirect=True)


class Close(Twin):
    """A twin that requires beta to be right to 1e-6."""

    def beta_tol(self, p: torch.Tensor) -> float:
        return min(1e-6, super().beta_tol(p))


def twin_of(params: Any, scope: str = "tensor", **options: Any) -> Twin:
    optimizer = build("adamw", params, lr=0.1, weight_decay=0.01, scope=scope, fused=True, **options)
    return Close(optimizer, make_oracle(optimizer, scope=scope), sync=True)


def rates(steps: int) -> list[tuple[float, ...]]:
    return [(RATES["adamw"][i % 5],) for i in range(steps)]


def words(implementation: str) -> str:
    return {"cpp": "C++ loop", "compile": "torch.compile"}[implementation]


@each_implementation
@pytest.mark.parametrize("options", [{}, {"maximize": True, "lambd": 0.0}], ids=["plain", "maximize"])
@pytest.mark.parametrize("scope", SCOPES)
def test_float32_against_float64(implementation: str, scope: str, options: dict[str, Any]) -> None:
    twin = twin_of(named_params(SHAPES, torch.float32), scope, **options)
    run_bowl(twin, Bowl.around(SHAPES, seed=3), rates(6))
    twin.assert_not_vacuous(0.2)
    assert words(implementation) in twin.optimizer.describe()


@each_implementation
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_mixed_dtypes(implementation: str, scope: str) -> None:
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bfloat16, torch.float16]
    shapes = [(9,), (5, 5), (1031,), (6, 2), (16_390,), (2050,)]
    named = [(f"w{i}", named_params([s], t, seed=i)[0][1]) for i, (s, t) in enumerate(zip(shapes, dtypes, strict=True))]
    groups = [{"params": named[:2]}, {"params": named[2:], "weight_decay": 0.0}]
    twin = twin_of(groups, scope)
    run_bowl(twin, Bowl.around(shapes, seed=11), [(r, 0.8 * r) for (r,) in rates(12)])
    twin.assert_not_vacuous()
    assert words(implementation) in twin.optimizer.describe() and "for 6" in twin.optimizer.describe()


@each_implementation
def test_strides(implementation: str) -> None:
    """Transposed, channels last, with gaps; gradients with other strides than their parameters."""
    shapes, params = with_odd_strides()
    strides = [p.stride() for p in params]
    twin = twin_of(params, "global")
    run_bowl(twin, Bowl.around(shapes, seed=5), rates(8), scatter_strides)
    assert [p.stride() for p in params] == strides
    assert "for 4" in twin.optimizer.describe() and "foreach for 1" in twin.optimizer.describe()


@each_implementation
def test_unaligned_views(implementation: str) -> None:
    """Views of one flat buffer at unaligned offsets, as engines make them."""
    base = torch.randn(40_100, generator=torch.Generator().manual_seed(0))
    shapes = [(17_001,), (5, 3), (22_000,)]
    pieces = [base[1:17_002], base[17_002:17_017].view(5, 3), base[18_001:40_001]]
    twin = twin_of([torch.nn.Parameter(p) for p in pieces])
    before = base[17_017:18_001].clone()
    run_bowl(twin, Bowl.around(shapes, seed=2), rates(5))
    twin.assert_not_vacuous()
    assert torch.equal(base[17_017:18_001], before)


def run_steps(
    steps: int = 4, bad: int | None = None, start: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> AMAdamW:
    params = named_params(SHAPES, dtype)
    optimizer = AMAdamW(params, lr=0.05, weight_decay=0.1, fused=True, **options)
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(step)
        for i, (_, p) in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype) + 0.5 * p.detach()
            if step == bad and i == 1:
                p.grad[-1] = float("nan")
        optimizer.step()
    return optimizer


@each_implementation
def test_runs_repeat_to_the_bit(implementation: str) -> None:
    assert_bitwise(snapshot(run_steps()), snapshot(run_steps()))


@cpp
def test_the_number_of_threads_does_not_matter(implementation: str, threads: Callable[[int], None]) -> None:
    ends = []
    for number in (1, 2, 3):
        threads(number)
        ends.append(snapshot(run_steps(scope="global")))
    assert_bitwise(ends[0], ends[1])
    assert_bitwise(ends[0], ends[2])


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, "bfloat16 exp_avg"],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_all_instruction_sets_give_the_same_bits(dtype: torch.dtype | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas on different CPUs stay equal, and a run resumes alike on another machine."""
    library = compiler.load_library()
    if len(library.paths) == 1:
        pytest.skip(f"this CPU has {', '.join(library.paths)} alone")
    low = {"exp_avg_dtype": torch.bfloat16} if isinstance(dtype, str) else {}
    ends = {}
    for name, path in library.paths.items():
        monkeypatch.setattr(library, "path", path)
        ends[name] = snapshot(run_steps(dtype=torch.float32 if isinstance(dtype, str) else dtype, **low))
    first, *others = ends.values()
    for other in others:
        assert_bitwise(first, other)


@each_implementation
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_step_that_is_not_finite_changes_nothing(implementation: str, value: float) -> None:
    optimizer = run_steps(3)
    before = snapshot(optimizer)
    params = optimizer.param_groups[0]["params"]
    for p in params:
        p.grad = torch.ones_like(p)
    params[-1].grad[77] = value
    optimizer.step()
    assert bool(optimizer.last_step_skipped)
    assert_bitwise(snapshot(optimizer), before)


@each_implementation
def test_a_skipped_first_step_leaves_no_trace(implementation: str) -> None:
    assert_bitwise(snapshot(run_steps(4, bad=0)), snapshot(run_steps(4, start=1)))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["compile"], indirect=True)
def test_nothing_is_compiled_again(implementation: str) -> None:
    """lr, beta2, step, beta_t and the decay's value change, and so do the sizes after two have been seen."""
    optimizer = run_steps(2)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for step in range(3):
        group = optimizer.param_groups[0]
        group |= {"lr": 0.01 * (step + 1), "weight_decay": 0.1 / (step + 1), "betas": (0.89, 0.9 + 0.01 * step)}
        for p in group["params"]:
            p.grad = torch.full_like(p, 0.1 * step)
        optimizer.step()
    other = AMAdamW(named_params([(50_000,), (77,)], torch.float32), weight_decay=0.1, fused=True)
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.step()
    assert counters["stats"]["unique_graphs"] == graphs


@cpp
def test_a_resumed_run_continues_to_the_bit(implementation: str) -> None:
    whole = run_steps(4)
    half = run_steps(2)
    params = [torch.nn.Parameter(p.detach().clone()) for p in half.param_groups[0]["params"]]
    resumed = AMAdamW([(f"w{i}", p) for i, p in enumerate(params)], lr=0.05, weight_decay=0.1, fused=True)
    resumed.load_state_dict(half.state_dict())
    for step in (2, 3):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) + 0.5 * p.detach()
        resumed.step()
    assert_bitwise(snapshot(resumed), snapshot(whole))


# ---------------------------------------------------------------- installation
@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    compiler.load_library.cache_clear()
    yield
    compiler.load_library.cache_clear()


def test_no_compiler_is_an_error_that_says_what_to_install(no_compiler: None) -> None:
    params = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler.*apt-get install g\+\+.*CXX.*fused=None"):
        AMAdamW(params, fused=True)
    optimizer = AMAdamW(params)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "fused": True})
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"apt-get install g\+\+"):
        optimizer.step()
    assert torch.equal(params[0].detach(), torch.ones(3))


def test_a_compiler_that_fails_is_an_error_with_its_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken compiler"
    broken.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{broken}'")
    compiler.load_library.cache_clear()
    try:
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = AMAdamW([param], fused=True)
        param.grad = torch.ones(3)
        with pytest.raises(RuntimeError, match=r"no such header.*or use fused=None"):
            optimizer.step()
        assert not optimizer.state and torch.equal(param.detach(), torch.ones(3))
    finally:
        compiler.load_library.cache_clear()


def test_a_device_without_kernels_is_named() -> None:
    asks = (registry.require_fused, lambda device: registry.require_kernel(Kind(device)))
    for ask in asks:
        with pytest.raises(RuntimeError, match=r"no kernels for parameters on 'hpu' .*cpu, cuda, .*xpu.*fused=None"):
            ask(torch.device("hpu"))
        ask(torch.device("xpu"))
    AMAdamW([torch.nn.Parameter(torch.empty(3, device="meta"))], fused=True)  # may be moved to a device before it steps


def test_a_library_that_is_there_is_not_announced(capfd: pytest.CaptureFixture[str]) -> None:
    description = compiler.load_library().description
    capfd.readouterr()
    assert compiler.load_library.__wrapped__().description == description
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_damaged_library_is_built_again_and_rank_0_announces_builds(tmp_path: Path) -> None:
    program = "from am_lightning.optim.kernels.cpu.build import load_library as load; print(load().description)"
    env = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def build_it(rank: int) -> str:
        ranked = env | {"RANK": str(rank)}
        done = subprocess.run([COLD, "-c", program], env=ranked, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        announced = [line for line in done.stderr.splitlines() if line.startswith("am_lightning compiles")]
        assert len(announced) == (rank == 0) and all(f"in {tmp_path}/am_lightning. " in line for line in announced)
        return done.stdout

    first = build_it(0)
    (library,) = (tmp_path / "am_lightning").glob("*.so")
    whole = library.read_bytes()
    library.write_bytes(whole[:100])
    assert build_it(1) == first
    assert len(library.read_bytes()) == len(whole)


def test_tensors_that_wrap_others_are_not_walked_by_address() -> None:
    """TwoTensor's own address is 0, and a kernel that reads there crashes the process."""
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3), torch.randn(4, 5, 3)

    def run(param: torch.nn.Parameter, wrap: Callable[[torch.Tensor], torch.Tensor], **options: bool) -> torch.Tensor:
        optimizer = AMAdamW([param], lr=1e-2, **options)
        for gradient in gradients:
            param.grad = wrap(gradient.clone())
            optimizer.step()
        return param.detach()

    def double(tensor: torch.Tensor) -> TwoTensor:
        return TwoTensor(tensor.clone(), tensor.clone())

    expected = run(torch.nn.Parameter(start.clone()), torch.clone)
    for options in ({"fused": True}, {}):
        found = run(torch.nn.Parameter(double(start)), double, **options)
        torch.testing.assert_close(found.a, expected)
        torch.testing.assert_close(found.b, expected)


@pytest.mark.slow
def test_processes_that_build_at_once_and_a_killed_build(tmp_path: Path) -> None:
    """No process waits for another, leftovers of a killed build do no harm, and the path may have spaces."""
    folder = tmp_path / "a folder" / "am_lightning"
    folder.mkdir(parents=True)
    (folder / "building_killed").mkdir()
    (folder / "building_killed" / "library.so").write_bytes(b"\x7fELF half of a libr")
    program = "from am_lightning.optim.kernels.cpu.build import load_library as load; print(load().description)"
    env = os.environ | {"TORCH_EXTENSIONS_DIR": str(folder.parent), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([COLD, "-c", program], env=env, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "C++ loop" in out or "OpenMP" in out
    built = sorted(p.name for p in folder.iterdir())
    assert len(built) == 2 and "building_killed" in built
