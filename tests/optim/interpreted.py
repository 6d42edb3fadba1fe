"""Functions that a process with TRITON_INTERPRET=1 runs: Triton kernels on CPU tensors beside the float64 oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from am_lightning.optim.kernels.inputs import Coefficients, GroupOptions, LocalShard
from am_lightning.optim.kernels.triton import kernels as triton_kernels
from am_lightning.optim.kernels.triton.launch import Tables, TritonPasses
from am_lightning.optim.kernels.workspace import Workspace
from tests.optim.harness import to_numpy
from tests.optim.oracle import OracleAdamW

BETA_TOL, FLOAT32_TOL, FLOAT64_TOL = 1e-6, 5e-7, 1e-12
# The interpreter truncates to bfloat16 where the device rounds: the error is one unit in the last place, not half.
UNIT = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
OPTIONS = {"lr": 0.02, "weight_decay": 0.05, "lambd": 0.1, "cap": 0.89, "maximize": False, "beta2": 0.99, "eps": 1e-8}


def check_interpreter() -> None:
    assert not isinstance(triton_kernels.sums_kernel, triton.JITFunction), "TRITON_INTERPRET=1 came after the import"


@triton.jit
def count_kernel(out, n):  # type: ignore[no-untyped-def]
    for i in range(n.to(tl.int32)):
        tl.store(out + i, i)


def refusal() -> str | None:
    """Return why this interpreter runs no loop, or None if it does."""
    try:
        count_kernel[(1,)](torch.zeros(3, dtype=torch.int32), 3)
    except InterpreterError as error:
        if "only 0-dimensional arrays" not in str(error):
            raise
        return f"the interpreter of Triton {triton.__version__} runs no loop beside numpy {np.__version__}"
    return None


class Case:
    """Rows in the middle of a run, as shards for the kernels and as slots of the oracle."""

    def __init__(
        self,
        sizes: list[int],
        dtypes: tuple[torch.dtype, ...],
        *,
        seed: int = 0,
        offset: int = 0,
        of: str = "gdvx",
        **options: Any,
    ) -> None:
        """Take the dtypes of g, d, v, x. Tensors named in ``of`` start ``offset`` elements after an aligned address."""
        self.options = OPTIONS | options
        generator = torch.Generator().manual_seed(seed)
        o = self.options
        kernel_options = GroupOptions(o["beta2"], o["lambd"], o["weight_decay"], 0.0, o["maximize"])
        self.pieces = []
        for row, size in enumerate(sizes):
            noise = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(4)]
            values = [noise[0], 0.5 * noise[1], noise[2].square() + 0.01, noise[3]]
            starts = [offset if name in of else 0 for name in "gdvx"]
            g, d, v, x = (_placed(t, dtype, at) for t, dtype, at in zip(values, dtypes, starts, strict=True))
            self.pieces.append(LocalShard(row, x, g, d, v, kernel_options))
        self.oracle = OracleAdamW([{**o, "params": [to_numpy(p.x) for p in self.pieces]}])
        for i, (slot, piece) in enumerate(zip(self.oracle.slots, self.pieces, strict=True)):
            slot.d, slot.v = to_numpy(piece.d), to_numpy(piece.v)
            slot.step, slot.beta_prod, slot.prev_lr = 3 + i, 0.8 ** (1 + i % 5), 0.02 * (0.9 + 0.01 * (i % 7))
        self.terms = [self.oracle.terms(s, to_numpy(p.g)) for s, p in zip(self.oracle.slots, self.pieces, strict=True)]

    def numbers(self) -> Coefficients:
        """Return from the slots what the optimizer would hand over."""
        o, slots = self.options, self.oracle.slots
        t = np.array([s.step + 1 for s in slots])
        c = 1 - o["cap"] * np.array([s.beta_prod for s in slots])
        k = (1 + o["weight_decay"] * o["lr"]) * np.array([s.prev_lr for s in slots]) / o["lr"]
        same = np.ones(len(slots))
        columns = {
            "one_plus_k": 1 + k,
            "c_root": c / np.sqrt(1 - o["beta2"] ** t),
            "c_eps": c * o["eps"],
            "lr": o["lr"] * same,
            "decay_factor": (1 - o["weight_decay"] * o["lr"]) * same,
            "omega": 0.15 + 0.01 * (np.arange(len(slots)) % 50),
            "step": t - 1,
        }
        return {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}

    def check_sums(self, sums: torch.Tensor, tol: float) -> None:
        """Compare 1 - N / D with the oracle's unclipped beta_t."""
        for row, (term, (num, den)) in enumerate(zip(self.terms, sums.tolist(), strict=True)):
            if not len(term.g):
                assert num == den == 0.0
                continue
            expected = term.num / term.den
            error = abs(1 - num / den - expected) / max(1.0, abs(expected))
            assert error <= tol, f"row {row}, {len(term.g)} elements: beta is off by {error:.2e}"
            assert abs(den - term.den) <= tol * term.den, f"row {row}: D is {den}, not {term.den}"

    def step(self, numbers: Coefficients, rows: range | list[int]) -> None:
        """Make the oracle's update with the omegas of ``numbers``."""
        omega = numbers["omega"].tolist()
        for row in rows:
            self.oracle.update(self.oracle.slots[row], self.terms[row], 1 - omega[row], float("nan"))

    def check_stored(self) -> None:
        for piece, slot in zip(self.pieces, self.oracle.slots, strict=True):
            for name, stored, expected in (("d", piece.d, slot.d), ("v", piece.v, slot.v), ("x", piece.x, slot.x)):
                tol = FLOAT64_TOL if piece.x.dtype == torch.float64 else FLOAT32_TOL
                limit = UNIT.get(stored.dtype, tol) * np.abs(expected) + tol
                wrong = np.abs(to_numpy(stored) - expected) > limit
                assert not wrong.any(), f"{name} of row {piece.row}: {to_numpy(stored)[wrong]} not {expected[wrong]}"


def _placed(values: torch.Tensor, dtype: torch.dtype, offset: int) -> torch.Tensor:
    room = torch.full((values.numel() + offset + 1,), 7.0, dtype=dtype)  # a missing mask would read and write it
    room[offset : offset + values.numel()] = values.to(dtype)
    return room[offset : offset + values.numel()]


def _after(tensor: torch.Tensor) -> torch.Tensor:
    """Return the element behind a tensor's last one."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + tensor.numel())


def _pair_dtypes(names: list[str]) -> tuple[torch.dtype, ...]:
    return tuple(getattr(torch, name) for name in names)


def begun(shards: list[LocalShard], workspace: Workspace | None = None) -> TritonPasses:
    passes = TritonPasses(shards, Workspace() if workspace is None else workspace)
    passes.begin()
    return passes


def both_passes(sizes: list[int], dtypes: list[str], *, offset: int = 0, **options: Any) -> None:
    """Compare both passes with the oracle. Nothing is written outside the tensors, and pass 1 repeats its bits."""
    case = Case(sizes, _pair_dtypes(dtypes), offset=offset, **options)
    numbers = case.numbers()
    passes = begun(case.pieces)
    before = [t.clone() for piece in case.pieces for t in piece.tensors()]
    sums = passes.sums(numbers, torch.float64)
    assert sums.dtype == torch.float64 and sums.shape == (len(sizes), 2)
    assert all(torch.equal(a, b) for a, b in zip(before, _tensors(case.pieces), strict=True)), "pass 1 has written"
    case.check_sums(sums, FLOAT64_TOL if dtypes[3] == "float64" else BETA_TOL)
    assert torch.equal(sums, passes.sums(numbers, torch.float64))
    passes.update(numbers, torch.ones(len(sizes), dtype=torch.bool))
    case.step(numbers, range(len(sizes)))
    case.check_stored()
    assert all(float(_after(t)) == 7.0 for t in _tensors(case.pieces)), "something was written behind a tensor"


def _tensors(pieces: list[LocalShard]) -> list[torch.Tensor]:
    return [t for piece in pieces for t in piece.tensors()]


def mixed_kinds() -> None:
    """Mix four dtypes, alignments and decays in one call: each row has its own sums and update."""
    kinds = [("float32",) * 4, ("bfloat16",) * 4, ("float32",) * 4, ("float64",) * 4, ("bfloat16", "float32") * 2]
    cases = [Case([9, 1500], _pair_dtypes(list(kind)), seed=i, offset=i % 2) for i, kind in enumerate(kinds)]
    cases.append(Case([40, 3], _pair_dtypes(["float32"] * 4), seed=9, weight_decay=0.0, maximize=True))
    cases = cases[::-1]
    order = [(c, r) for r in range(2) for c in range(len(cases))]  # kinds alternate
    last = len(order) - 1
    pieces, columns = [], {}
    for slot, (c, r) in enumerate(order):  # rows in reverse order
        piece = cases[c].pieces[r]
        pieces.append(LocalShard(last - slot, piece.x, piece.g, piece.d, piece.v, piece.options))
    for c, r in order[::-1]:
        for name, column in cases[c].numbers().items():
            columns.setdefault(name, []).append(column[r] + (name == "omega") * 0.05 * c)
    numbers = {name: torch.stack(column) for name, column in columns.items()}
    passes = begun(pieces)
    sums = passes.sums(numbers, torch.float64)
    passes.update(numbers, torch.ones(len(pieces), dtype=torch.bool))
    for c, case in enumerate(cases):
        case.check_sums(torch.stack([sums[order.index((c, r))] for r in range(2)]), BETA_TOL)
        own = case.numbers()
        own["omega"] += 0.05 * c
        case.step(own, range(2))
        case.check_stored()


def alone_or_among_many() -> None:
    """The sums of a tensor have one order, whichever tensors are stepped with it, so their bits are the same."""
    case = Case([100, 20_001, 5], _pair_dtypes(["float32"] * 4))
    numbers = case.numbers()
    together = begun(case.pieces).sums(numbers, torch.float64)
    for piece, pair in zip(case.pieces, together, strict=True):
        assert torch.equal(begun([piece]).sums(numbers, torch.float64)[0], pair)


def uncounted_rows() -> None:
    """An inactive row keeps every bit, with nan in its gradient or without; the other rows are stepped."""
    case = Case([10, 3000, 9000], _pair_dtypes(["float32"] * 4))
    case.pieces[1].g[17] = float("nan")
    numbers = case.numbers()
    before = [t.clone() for t in case.pieces[1].tensors()]
    passes = begun(case.pieces)
    assert torch.isfinite(passes.sums(numbers, torch.float64)).all(1).tolist() == [True, False, True]
    passes.update(numbers, torch.tensor([True, False, True]))
    for now, old in zip(case.pieces[1].tensors(), before, strict=True):
        assert torch.equal(now.view(torch.int32), old.view(torch.int32))
    case.step(numbers, [0, 2])
    del case.pieces[1], case.oracle.slots[1]
    case.check_stored()


def scaled_gradients(dtype: str) -> None:
    """A scale applied in registers equals a gradient that was scaled before."""
    dtypes = _pair_dtypes([dtype, *["float32"] * 3])
    scaled, plain = Case([700, 9000], dtypes), Case([700, 9000], dtypes)
    for piece in scaled.pieces:
        piece.g *= 4.0
    numbers, scale, counts = plain.numbers(), torch.tensor(0.25), torch.ones(2, dtype=torch.bool)
    workspace = Workspace()
    workspace.gradient_factor = scale
    passes = begun(scaled.pieces, workspace)
    plain.check_sums(passes.sums(numbers, torch.float64), BETA_TOL)
    passes.update(numbers, counts)
    plain.step(numbers, range(2))
    scaled.oracle = plain.oracle
    scaled.check_stored()


class Counter:
    """Replace a kernel and count its launches."""

    def __init__(self, kernel: Any, launches: list[str], name: str) -> None:
        self._kernel, self._launches, self._name = kernel, launches, name

    def __getitem__(self, grid: Any) -> Any:
        self._launches.append(self._name)
        return self._kernel[grid]


def launches(count: int) -> list[str]:
    """Return the launches of one step of ``count`` tensors of one kind."""
    case = Case([1 + i % 40 for i in range(count)], _pair_dtypes(["float32"] * 4))
    numbers, made = case.numbers(), []
    kept = {name: getattr(triton_kernels, name) for name in ("sums_kernel", "reduce_kernel", "update_kernel")}
    try:
        for name, kernel in kept.items():
            setattr(triton_kernels, name, Counter(kernel, made, name))
        passes = begun(case.pieces)
        case.check_sums(passes.sums(numbers, torch.float64), BETA_TOL)
        passes.update(numbers, torch.ones(count, dtype=torch.bool))
    finally:
        for name, kernel in kept.items():
            setattr(triton_kernels, name, kernel)
    case.step(numbers, range(count))
    case.check_stored()
    return made


def other_addresses() -> None:
    """New gradients and changed options take effect; nothing else is rebuilt."""
    case = Case([300, 9000], _pair_dtypes(["float32"] * 4))
    numbers, workspace = case.numbers(), Workspace()
    tables = workspace.keep(Tables)
    begun(case.pieces, workspace).sums(numbers, torch.float64)
    (first,) = tables.prepare(case.pieces)
    old = [piece.g for piece in case.pieces]
    for piece in case.pieces:
        piece.g = -piece.g
    for gradient in old:
        gradient.fill_(float("nan"))
    other = Case([300, 9000], _pair_dtypes(["float32"] * 4), maximize=True)  # sees -(-g)
    for piece in case.pieces:
        piece.options = piece.options._replace(maximize=True)
    other.terms = Case([300, 9000], _pair_dtypes(["float32"] * 4)).terms
    other.check_sums(begun(case.pieces, workspace).sums(numbers, torch.float64), BETA_TOL)
    (second,) = tables.prepare(case.pieces)
    assert second.group is first.group
    (third,) = tables.prepare(case.pieces)
    assert third.addresses is second.addresses and third.options is second.options


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _rounded(d: np.ndarray, step: int, row: int) -> np.ndarray:
    """Round float32 to bfloat16 in numpy, as documented."""
    seed = _mixed(np.array([(step + 0x9E3779B9 * (row + 1)) % 2**32], dtype=np.uint32))
    noise = _mixed(np.arange(d.size, dtype=np.uint32) ^ seed) >> 16
    return (((d.astype(np.float32).view(np.uint32) + noise) >> 16) << 16).view(np.float32)


def stochastic_rounding() -> None:
    """float32 parameters with d in bfloat16 have the documented bits: unbiased, reproducible, new in each step."""
    dtypes = _pair_dtypes(["float32", "bfloat16", "float32", "float32"])
    case, again, later = (Case([3, 9000], dtypes) for _ in range(3))
    counts = torch.ones(2, dtype=torch.bool)
    for each in (case, again, later):
        numbers = each.numbers()
        numbers["step"] += 1 if each is later else 0
        begun(each.pieces).update(numbers, counts)
        each.step(numbers, range(2))
        each.check_stored()
    for row, piece in enumerate(case.pieces):
        exact = case.oracle.slots[row].d
        step = 3 + row
        expected = _rounded(exact, step, row)
        same = np.mean(to_numpy(piece.d) == expected)  # float32's rounding of d' moves a few across a border
        assert same >= 0.99 or exact.size < 100, f"only {same:.1%} of row {row} are as documented"
        assert torch.equal(piece.d, again.pieces[row].d)
    unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    bias = np.mean((to_numpy(case.pieces[1].d) - exact) / unit)
    assert abs(bias) < 0.02, f"the mean error is {bias:.3f} units in the last place"  # truncation: -0.5 of its sign
    assert 0.2 < np.mean(to_numpy(later.pieces[1].d) == to_numpy(case.pieces[1].d)) < 0.9
