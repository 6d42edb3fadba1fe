"""One step of adaptive memory, shared by AMAdamW and AMSGD: local sums, one reduce, the closed form, the update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from am_lightning.distributed import LogicalParam, ShardLayout, local_grad, local_shard
from am_lightning.distributed.call_stack import inside_deepspeed_warm_up, inside_state_creation
from am_lightning.distributed.strategies.fsdp1 import is_managed
from am_lightning.optim import state as param_state
from am_lightning.optim.closed_form import Decision, Sums, decide, gap_factor
from am_lightning.optim.compile_boundary import uncompiled
from am_lightning.optim.kernels import Numbers, Options, Passes, Piece
from am_lightning.optim.kernels import fused as fused_kernels
from am_lightning.optim.kernels.agreement import agree_on_kernels, choice_of, drop_fused, row_kernels
from am_lightning.optim.kernels.inputs import Clip
from am_lightning.optim.kernels.transfer import is_capturing, moved
from am_lightning.optim.kernels.triton.row_launch import Coefficients, RowKernels
from am_lightning.optim.scalars import StateScalars, sums_live_on
from am_lightning.optim.state_store import PersistentOptimizer


class InKernels(NamedTuple):
    """What a step needs whose rows' numbers are kernels' work."""

    kernels: RowKernels
    coefficients: Coefficients
    store: StateScalars
    table: Tensor  # [4, rows], the store's states


class Local(NamedTuple):
    """What both passes over one layout need on this rank."""

    pieces: list[Piece]
    scalars: dict[str, Tensor]
    numbers: Numbers
    passes: Passes
    in_kernels: InKernels | None


class AdaptiveMemoryOptimizer(PersistentOptimizer):
    """Rows, packed sums and state; a subclass says what its metric, its state and its options are."""

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], *, scope: str, nonfinite: str, replica_group: Any
    ) -> None:
        given: Any = params
        if isinstance(given, torch.nn.Module) and not isinstance(given, torch.nn.ParameterList):
            raise TypeError(
                f"Invalid params: {type(given).__name__} (params must be an iterable of parameters: "
                "model.parameters(); am_lightning.am_adamw and am_sgd take a model)"
            )
        self._configure(scope=scope, nonfinite=nonfinite, replica_group=replica_group)
        super().__init__(params, defaults)

    # ------------------------------------------------------------------ what a subclass says
    def _options(self, group: dict[str, Any]) -> Options:
        raise NotImplementedError

    def _row_options(self, group: dict[str, Any]) -> list[float | Tensor]:
        """cap, lr, mu, beta2, eps, where the metric is AdamW's."""
        raise NotImplementedError

    def _metric_numbers(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        """``root`` and ``floor`` of the metric, ``[rows]``; nothing for the identity."""
        return {}

    def _omega(self, decision: Decision, sums: Sums) -> Tensor:
        """``[rows]``, the weight of the gradient in d' = d + omega (g - d) / q."""
        return 1 - decision.beta

    def _check_loss(self, loss: Any, closure: Callable[[], Any] | None) -> None:
        """Refuse a closure that does not give what the step needs, before anything moves."""

    def _shared_sums(self, pieces: list[Piece], layout: ShardLayout, loss: Any, like: Tensor) -> Tensor | None:
        """Numbers that ride in the packed reduce and in which every rank counts, ``[m]``."""
        return None

    def _known_gap(self, shared: Tensor | None, numbers: dict[str, Tensor]) -> Tensor | None:
        """0-dim (1 + mu eta_t) Delta_t / eta_t where the loss gap is known."""
        return None

    def _gradients(self, shared: Tensor | None) -> Tensor | None:
        """0-dim, 0 where all gradients are zero; None where D says it."""
        return None

    def _after(self, decision: Decision, shared: Tensor | None) -> None:
        """Remember what the next step needs."""

    # ------------------------------------------------------------------ public face
    @property
    def last_step_skipped(self) -> Tensor:
        """0-dim bool on the device of the sums: the last step was dropped because a sum was not finite."""
        return self._record.skipped.clone()

    def momentum(self) -> dict[str, Tensor]:
        """Parameter name -> beta_t of the last step in which it took part (nan before its first).

        Returns:
            0-dim tensors in [0, cap] on the device, in float64 where the device has it; a snapshot, no host sync.
            Unnamed parameters are called ``group.index``.
        """
        return dict(zip(self.parameter_names(), self._betas().unbind(), strict=True))

    def report(self) -> Tensor:
        """``[parameters + 4]`` on the device: every beta_t, then what ``StepRecord`` counts. No host sync."""
        betas = self._betas()
        return torch.cat([betas, self._record.numbers(betas)])

    def remember_grad_norm(self, norm: Tensor) -> None:
        """Keep the global gradient norm for ``report``."""
        self._record.grad_norm = norm.detach()

    def clip_gradients_in_step(self, norm: Tensor, max_norm: float) -> None:
        """The next ``step`` clips its gradients, whose ``norm`` (0-dim) is known; ``zero_grad`` takes this back.

        Triton kernels multiply in registers and leave the gradients as they are, others multiply in place.
        """
        self._workspace.gradient_clip = Clip(norm, max_norm)

    def spread(self, values: Tensor, here: tuple[int, ...], rows: int) -> Tensor:
        """``[here]`` -> ``[rows]``: each number at its row, zero elsewhere."""
        out = values.new_zeros(rows)
        return out.index_copy_(0, self._workspace.constants.vector(here, values.device), values)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all optimized parameters, as in torch.optim."""
        self._workspace.gradient_clip = None
        super().zero_grad(set_to_none)

    @uncompiled  # torch.compile would cut it into many graphs, and make them again for other numbers
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step; where ``torch.compile`` meets it, it runs as it is.

        Args:
            closure: reevaluates the model and returns the loss, which is returned; called first.

        Raises:
            RuntimeError: a gradient is sparse or complex; nothing has moved.
            ValueError: at the first step, on every rank: a layout or scope that cannot be summed rightly (the text has
                the cure).
        """
        if not self.state and inside_deepspeed_warm_up():
            return None
        if not self.state and inside_state_creation():
            self._create_states()
            return None
        self._complete_foreign_groups()  # before anything reads an option
        self._check_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_loss(loss, closure)
        self._read_tables()
        layout = self.current_layout()
        local, shared = self.prepare(layout), None
        if self.pre_pass is None:
            packed = self.packed_sums(layout, local)
            packed, shared = layout.all_reduce(packed, self._shared_sums(local.pieces, layout, loss, packed))
            if local.in_kernels is not None:
                self._finish_in_kernels(packed, local, local.in_kernels)
                return loss
            sums = Sums.unpack(packed)
            gap, gradients = self._known_gap(shared, local.scalars), self._gradients(shared)
            decision = self.decide(
                sums, local.scalars, layout.sizes, pool=layout.stage_reduction(), gap=gap, gradients=gradients
            )
        else:
            sums, decision = self.pre_pass(layout)
        local.numbers.add("omega", self._omega(decision, sums))
        local.passes.update(local.numbers, decision.counts)
        self._count(local.scalars, decision)
        self._record.observe(decision, self._positions(layout), again=self._is_again(layout))
        self._after(decision, shared)
        return loss

    def prepare(self, layout: ShardLayout) -> Local:
        """Read-only but for states that do not exist yet."""
        pieces = self._pieces(layout)
        in_kernels = self._prepare_in_kernels(pieces, layout)
        if in_kernels is None:
            scalars = self._scalars(*sums_live_on([row.param for row in layout.logical_params]))
            numbers = Numbers(self._numbers(scalars))
        else:
            scalars, numbers = {}, in_kernels.coefficients.numbers
        choices = [choice_of(group) for group in self.param_groups]
        passes = Passes(pieces, [choices[layout.logical_params[p.row].group_index] for p in pieces], self._workspace)
        self._tiers = passes.tiers
        return Local(pieces, scalars, numbers, passes, in_kernels)

    def packed_sums(self, layout: ShardLayout, local: Local) -> Tensor:
        """Pass 1 over this rank's pieces, read-only: ``[rows, 4]``, N, D, present, first."""
        device, dtype = sums_live_on([row.param for row in layout.logical_params])
        sums = local.passes.sums(local.numbers, len(layout.logical_params), device, dtype)
        if local.in_kernels is not None:
            return torch.cat([sums, local.in_kernels.coefficients.tail], 1)
        present = self._present_rows(local.pieces, layout, device, dtype)
        first = present * (local.scalars["step"] == 0)
        return torch.cat([sums, present[:, None], first[:, None]], 1)

    def _prepare_in_kernels(self, pieces: list[Piece], layout: ShardLayout) -> InKernels | None:
        """The rows' numbers by two kernels, where their tensors go to Triton and the metric is AdamW's."""
        if self.pre_pass is not None or len(self.moments) < 2:
            return None
        store = self._store()
        if not isinstance(store, StateScalars):
            return None
        kernels = row_kernels(layout, self.param_groups, self.scope, store, self._workspace)
        if kernels is None:
            return None
        table, workspace = store.table(), self._workspace
        present = self._present_rows(pieces, layout, table.device, torch.float64)
        options = [self._row_options(group) for group in self.param_groups]
        found = kernels.coefficients(table, options, present, workspace.gradient_clip)
        workspace.gradient_factor = found.factor
        return InKernels(kernels, found, store, table)

    def _finish_in_kernels(self, packed: Tensor, local: Local, rows: InKernels) -> None:
        """From the reduced sums to the end of the step."""
        kernels, found, store, table = rows
        record = self._record.buffers(packed.device)
        omega, counts = kernels.decide(packed, found.columns, table, *record, skip=self.nonfinite == "skip")
        local.numbers.add("omega", omega)
        local.passes.update(local.numbers, counts)
        store.take(table, counts)

    def decide(self, sums: Sums, scalars: dict[str, Tensor], sizes: list[int], **more: Any) -> Decision:
        """beta_t of rows whose reduced sums are known; ``sizes`` says how many rows each group has."""
        return decide(
            sums,
            cap=scalars["cap"],
            lr=scalars["lr"],
            scope=self.scope,
            sizes=sizes,
            first_takes_cap=self.first_takes_cap,
            nonfinite=self.nonfinite,
            **more,
        )

    def _kernels_in_words(self) -> str:
        parts = [f"{fused_kernels.words_of(tier)} for {count}" for tier, count in self._tiers.items()]
        why = self._workspace.why_not_triton
        return f"; kernels: {', '.join(parts)}{f' (no Triton: {why})' if why else ''}" if parts else ""

    def _is_again(self, layout: ShardLayout) -> bool:
        """An engine calls step() several times in one training step, and this is not the first of them."""
        return layout is not next(iter(self._layouts.values()))

    def _positions(self, layout: ShardLayout) -> Tensor | None:
        """``[rows]``: where this layout's rows are in ``parameter_names``; None where they are all of them."""
        if not layout.logical_params or not layout.logical_params[0].partitioned:
            return None
        if layout not in self._places:
            place = {name: i for i, name in enumerate(self.parameter_names())}
            device, _ = sums_live_on([layout.logical_params[0].param])
            self._places[layout] = torch.tensor([place[row.name] for row in layout.logical_params], device=device)
        return self._places[layout]

    # ------------------------------------------------------------------ rows and their numbers
    def _check_capture(self) -> None:
        check = getattr(self, "_accelerator_graph_capture_health_check", None) or self._cuda_graph_capture_health_check
        if all("capturable" in group for group in self.param_groups):
            check()
        if self._layout is None:
            self._check_time()

    def _check_time(self) -> None:
        for param in self._checked_parameters():  # a layout takes copies, collectives, kernels that are built and tried
            _refuse_in_capture(param)

    def _pieces(self, layout: ShardLayout) -> list[Piece]:
        """The rows that have a gradient here. All are checked before the first state is made."""
        rows = [(i, row) for i, row in enumerate(layout.logical_params) if row.param.grad is not None]
        for _, row in rows:
            _check_gradient(row.param, row.name, type(self).__name__)
        options = [self._options(group) for group in self.param_groups]
        direction, *second = self.moments
        pieces = []
        for i, row in rows:
            state = self._row_state(row, self.param_groups[row.group_index])
            x, g, d = local_shard(row, row.param), local_grad(row), local_shard(row, state[direction])
            v = local_shard(row, state[second[0]]) if second else None
            if x.ndim == 0:  # a 0-dim operand would take the dtype of a 0-dim number
                x, g, d, v = x.reshape(1), g.reshape(1), d.reshape(1), None if v is None else v.reshape(1)
            pieces.append(Piece(i, x, g, d, v, options[row.group_index]))
        return pieces

    def _check_scope(self, layout: ShardLayout) -> None:
        super()._check_scope(layout)
        self._check_direction(layout.logical_params)
        self._agree_on_kernels(layout)
        param_state.follow(self.state, [row.param for row in layout.logical_params])

    def _agree_on_kernels(self, layout: ShardLayout) -> None:
        if not agree_on_kernels(layout, self.param_groups, self._workspace, self.fused_dropped, self.exp_avg_dtype):
            drop_fused([*self.param_groups, self.defaults])

    def _check_direction(self, rows: list[LogicalParam]) -> None:
        """Refuse a direction of its own dtype where an engine packs the states of many tensors into one."""
        if self.exp_avg_dtype is None:
            return
        for row in rows:
            engine = "DeepSpeed ZeRO" if row.partitioned else "FSDP1" if is_managed(row.param) else None
            if engine is not None:
                raise ValueError(
                    f"Invalid exp_avg_dtype: {self.exp_avg_dtype} ({engine}, which holds parameter {row.name!r}, saves "
                    "states of one dtype only: exp_avg_dtype must be None there; FSDP2 and DDP take it)"
                )

    def _create_states(self) -> None:
        self._check_direction(self._rows())
        for row in self._rows():
            if row.param.grad is not None:
                self._row_state(row, self.param_groups[row.group_index])

    def _row_state(self, row: LogicalParam, group: dict[str, Any]) -> dict[str, Any]:
        known = self.state.get(row.param, {})  # an engine may have left an empty dict
        if self.moments[0] not in known or not (row.partitioned or "prev_lr" in known):
            _refuse_in_capture(row.param)
        state = self.state[row.param]
        if self.moments[0] not in state:
            param_state.create(
                state, row.param, self.moments, adaptive=not row.partitioned, direction=self.exp_avg_dtype
            )
        elif not row.partitioned:
            param, cap = row.param, group[self.cap_key]
            param_state.complete(state, param, beta1=cap, lr=group["lr"], cap=cap)
        return state  # type: ignore[no-any-return]

    def _scalars(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """``[rows]`` each: the rows' own scalars and the groups' options."""
        scalars = self._store().read()
        options = [self._options(group) for group in self.param_groups]
        scalars["cap"] = self._per_row([group[self.cap_key] for group in self.param_groups], device, dtype)
        scalars["lr"] = self._per_row([group["lr"] for group in self.param_groups], device, dtype)
        scalars["mu"] = self._per_row([o.mu for o in options], device, dtype)
        return scalars

    def _numbers(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        lr, mu = scalars["lr"], scalars["mu"]
        gap = 1 + gap_factor(lr, scalars["prev_lr"], mu)
        numbers = {"gap": gap, "lr": lr, "shrink": 1 - mu * lr, "step": scalars["step"]}
        return numbers | self._metric_numbers(scalars)

    def _per_row(self, values: list[float | Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
        """``[rows]``: an option of every row's group. Host numbers are filled in on the device: no copy, no sync."""
        assert self._layout is not None  # step() has built it
        parts = []
        for value, size in zip(values, self._layout.sizes, strict=True):
            rows = (size,)
            if isinstance(value, Tensor):
                parts.append(moved(value.detach().reshape(1), device, dtype).expand(rows))
            else:
                parts.append(torch.full(rows, float(value), dtype=dtype, device=device))
        return torch.cat(parts)

    def _present_rows(
        self, pieces: list[Piece], layout: ShardLayout, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """``[rows]``: 1 where this rank has a gradient."""
        here = {piece.row for piece in pieces}
        return self._workspace.constants.vector(
            tuple(i in here for i in range(len(layout.logical_params))), device, dtype
        )

    def _count(self, scalars: dict[str, Tensor], decision: Decision) -> None:
        """Write the adaptive scalars of the rows that took part."""
        counts, beta = decision.counts, decision.beta
        new = {
            "step": scalars["step"] + counts,
            "beta_prod": torch.where(counts, scalars["beta_prod"] * beta, scalars["beta_prod"]),
            "beta": torch.where(counts, beta, scalars["beta"]),
            "prev_lr": torch.where(counts, scalars["lr"], scalars["prev_lr"]),
        }
        self._store().write(new, counts)


def _check_gradient(param: Tensor, name: str, who: str) -> None:
    grad = param.grad
    assert grad is not None
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{who} does not support sparse gradients: parameter {name!r} has a gradient of layout {grad.layout}"
        )
    if grad.is_complex() or param.is_complex():
        raise RuntimeError(
            f"{who} does not support complex parameters: parameter {name!r} is {param.dtype}; use view_as_real"
        )


def _refuse_in_capture(param: Tensor) -> None:
    """The zeros of a state that is made in a CUDA graph's capture are recorded, and filled at replays only."""
    if is_capturing(param.device):
        raise RuntimeError(
            f"a CUDA graph is being captured, and a parameter of shape {tuple(param.shape)} in it has no optimizer "
            "state that a step has used: make a step with the same gradients before it, as torch's warm-up does"
        )
