"""The code of the Triton kernels for NVIDIA and AMD, compiled as a step would launch them. It needs no GPU."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from am_lightning.optim.kernels.inputs import SUM_BLOCK, GradientClip, GroupOptions, LocalShard
from am_lightning.optim.kernels.triton import launch as triton_pair
from am_lightning.optim.kernels.triton import row_kernels as triton_row_kernels
from am_lightning.optim.kernels.triton import row_launch as triton_rows
from am_lightning.optim.kernels.triton.tables import BLOCK, BLOCKS
from am_lightning.optim.kernels.workspace import Workspace

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
ALL_F32, ALL_BF16 = (F32,) * 4, (BF16,) * 4
WIDE = 16  # bytes of the widest access of one thread
THREADS = 128
POINTERS = {F64: "*fp64", F32: "*fp32", torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8"}
CASES = [
    (80, ALL_F32),
    (80, ALL_BF16),
    (90, ALL_F32),
    (90, ALL_BF16),
    (90, (F64,) * 4),
    (90, (BF16, F32, F32, BF16)),
    (90, (F32, BF16, F32, F32)),
]


class Recorder:
    """Stand in for a kernel and record its launch arguments."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.args, self.kwargs = args, kwargs

        return launch

    def compile(self, target: GPUTarget) -> Any:
        """Compile the launch as the just-in-time compiler would on such a GPU."""
        names = self.kernel.arg_names
        given = dict(zip(names, self.args, strict=False)) | self.kwargs
        constants = {n: given[n] for n in names if not isinstance(given[n], torch.Tensor)}
        signature = {n: "constexpr" if n in constants else POINTERS[given[n].dtype] for n in names}
        aligned = [n for n in names if n not in constants and given[n].data_ptr() % WIDE == 0]
        if "constexprs" not in inspect.signature(ASTSource).parameters:
            pytest.skip(f"Triton {triton.__version__} has another interface for PTX")
        source = ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs={(names.index(n),): value for n, value in constants.items()},
            attrs={(names.index(n),): [["tt.divisibility", WIDE]] for n in aligned},
        )
        options = {name: value for name, value in self.kwargs.items() if name not in names}
        assert options["num_warps"] * 32 == THREADS
        return triton.compile(source, target=target, options=options)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Return the module of kernels with launches only recorded."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    real = triton_pair.require_triton()
    names = ("sums_kernel", "reduce_kernel", "update_kernel")
    recorders = SimpleNamespace(tl=real.tl, **{name: Recorder(getattr(real, name)) for name in names})
    monkeypatch.setattr(triton_pair, "require_triton", lambda: recorders)
    return recorders


def nvidia(capability: int) -> GPUTarget:
    return GPUTarget("cuda", capability, 32)


def launch(dtypes: tuple[torch.dtype, ...], *, offset: int = 0, of: str = "gdvx") -> None:
    """Record a step of one tensor; dtypes of g, d, v, x. Those in ``of`` begin ``offset`` elements later."""
    starts = [offset if name in of else 0 for name in "gdvx"]
    g, d, v, x = (torch.ones(41, dtype=dtype)[at : at + 40] for dtype, at in zip(dtypes, starts, strict=True))
    names = ("one_plus_k", "c_root", "c_eps", "lr", "decay_factor", "omega", "step")
    numbers = {name: torch.ones(1, dtype=torch.float64) for name in names}
    shard = LocalShard(0, x, g, d, v, GroupOptions(0.999, 0.1, 0.01, 0.0, False))
    passes = triton_pair.TritonPasses([shard], Workspace())
    passes.begin()
    passes.sums(numbers, torch.float64)
    passes.update(numbers, torch.ones(1, dtype=torch.bool))


def accesses(ptx: str, word: str) -> tuple[int, int]:
    """Return the numbers of (16-byte, narrower) accesses of global memory."""
    widths = re.findall(rf"\b{word}\.global\S*?(?:\.v(\d))?\.b(\d+)\b", ptx)
    wide = sum(int(count or 1) * int(bits) == 8 * WIDE for count, bits in widths)
    return wide, len(widths) - wide


def wide_accesses(*dtypes: torch.dtype) -> int:
    """Return the number of 16-byte accesses that a thread makes for one full block of these tensors."""
    return sum(BLOCK * dtype.itemsize // THREADS // WIDE for dtype in dtypes)


def stack_bytes(compiled: Any, folder: Path) -> int:
    """Return the bytes of registers spilled to a thread's stack."""
    tool = Path(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    return max(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


@pytest.mark.nightly("machine code")
@pytest.mark.parametrize(("capability", "dtypes"), CASES, ids=lambda v: str(v).replace("torch.", ""))
def test_full_chunks_use_the_widest_accesses(
    kernels: SimpleNamespace, tmp_path: Path, capability: int, dtypes: tuple[torch.dtype, ...]
) -> None:
    """The unmasked loop accesses every tensor 16 bytes at a time, without atomics or spills."""
    launch(dtypes)
    sums, update = (kernel.compile(nvidia(capability)) for kernel in (kernels.sums_kernel, kernels.update_kernel))
    g, d, v, x = dtypes
    assert accesses(sums.asm["ptx"], "ld")[0] == wide_accesses(g, d, v, x)
    assert accesses(update.asm["ptx"], "ld")[0] == wide_accesses(g, d, v, x)
    assert accesses(update.asm["ptx"], "st")[0] == wide_accesses(d, v, x)
    for kernel in (sums, update):
        assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"])
        assert stack_bytes(kernel, tmp_path) == 0


def test_addresses_that_are_not_aligned_are_not_taken_for_aligned(kernels: SimpleNamespace) -> None:
    launch(ALL_F32, offset=1)
    for kernel in (kernels.sums_kernel, kernels.update_kernel):
        ptx = kernel.compile(nvidia(90)).asm["ptx"]
        assert accesses(ptx, "ld")[0] == accesses(ptx, "st")[0] == 0


@pytest.mark.parametrize("of", ["g", "x", "gx", "v"])
def test_a_tensor_at_an_odd_place_costs_its_own_access_alone(kernels: SimpleNamespace, of: str) -> None:
    """Gradients of FSDP2 and DDP are views at any offset. d and v change together, which bounds the kinds."""
    launch(ALL_F32, offset=1, of=of)
    wide = wide_accesses(F32)
    aligned = {"g": "dvx", "x": "gdv", "gx": "dv", "v": "gx"}[of]
    for kernel, word, read in ((kernels.sums_kernel, "ld", "gdvx"), (kernels.update_kernel, "st", "dvx")):
        ptx = kernel.compile(nvidia(90)).asm["ptx"]
        assert accesses(ptx, word)[0] == wide * sum(name in aligned for name in read)


@pytest.mark.nightly("machine code")
def test_rocm(kernels: SimpleNamespace) -> None:
    """An MI300 accesses 16 bytes at a time, too, and spills nothing."""
    launch(ALL_F32)
    for kernel, stores in ((kernels.sums_kernel, 0), (kernels.update_kernel, 3)):
        code = kernel.compile(GPUTarget("hip", "gfx942", 64)).asm["amdgcn"]
        assert len(re.findall(r"_load_dwordx4\b", code)) >= 4  # a few scalars may be read together, too
        assert len(re.findall(r"_store_dwordx4\b", code)) == stores
        assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", code) == ["0"] and "atomic" not in code


def test_the_second_stage(kernels: SimpleNamespace, tmp_path: Path) -> None:
    """float64 additions without atomics or spills; one program sums an embedding of Llama-8B in few iterations."""
    launch(ALL_F32)
    assert -(-128_256 * 4096 // (BLOCK * BLOCKS)) / kernels.reduce_kernel.kwargs["BLOCK"] <= 32
    compiled = kernels.reduce_kernel.compile(nvidia(80))
    assert stack_bytes(compiled, tmp_path) == 0
    ptx = compiled.asm["ptx"]
    assert "add.f64" in ptx.replace(".rn", "") and not re.search(r"\b(atom|red)\.", ptx)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_the_rows_own_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scope: str) -> None:
    """The kernels of the scalars are built for NVIDIA and AMD, without atomics or spills."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    names = ("coefficients_kernel", "decide_kernel")
    recorders = SimpleNamespace(**{name: Recorder(getattr(triton_row_kernels, name)) for name in names})
    monkeypatch.setattr(triton_rows, "_kernels", lambda: recorders)
    rows, record = triton_rows.RowKernels([20, 30], scope, torch.device("cpu")), torch.zeros(4, dtype=torch.int64)
    clip = GradientClip(torch.ones((), dtype=F64), 1.0)
    found = rows.coefficients(torch.zeros(4, 50), [[0.9, 0.1, 0.0, 0.99, 1e-8]] * 2, torch.ones(50, dtype=F64), clip)
    packed, skipped = torch.zeros(50, 4, dtype=F64), torch.zeros((), dtype=torch.bool)
    tally = torch.zeros(6, 50, dtype=F64)
    rows.decide(packed, found.columns, torch.zeros(4, 50), record, skipped, tally, skip=True)
    for recorder in (recorders.coefficients_kernel, recorders.decide_kernel):
        compiled = recorder.compile(nvidia(90))
        assert not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])
        assert stack_bytes(compiled, tmp_path) == 0
        assert "atomic" not in recorder.compile(GPUTarget("hip", "gfx942", 64)).asm["amdgcn"]


def test_a_chunk_is_no_longer_than_a_block_of_sums() -> None:
    assert BLOCK * BLOCKS <= SUM_BLOCK
