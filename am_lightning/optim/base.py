"""One step of adaptive memory, shared by AMAdamW and AMSGD: local sums, one reduce, the closed form, the update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from am_lightning.names import names_by_id
from am_lightning.optim import state as row_state
from am_lightning.optim.closed_form import Decision, Sums, decide, gap_factor
from am_lightning.optim.kernels import Numbers, Options, Passes, Piece
from am_lightning.optim.kernels.blocked import Scratch
from am_lightning.optim.kernels.passes import tier
from am_lightning.optim.placement import PlacedOptimizer
from am_lightning.optim.record import StepRecord
from am_lightning.optim.validation import NONFINITE, SCOPES, check_choice
from am_lightning.sharding import Layout, gradient_of, piece_of

_NAMES = "_names_of_unnamed"  # in a pickle: what name_parameters() gave
_WHOLE_OPTIMIZER = ("scope", "nonfinite", "loss_gap", "replica_group")  # options that no group has of its own


class AdaptiveMemoryOptimizer(PlacedOptimizer):
    """Rows, packed sums and state; a subclass says what its metric, its state and its options are."""

    cap_key: str  # group option that holds the cap of beta_t
    moments: tuple[str, ...]  # state tensors shaped like the parameter, the direction d first
    first_takes_cap: bool  # a row's own first step uses the cap
    plain_attributes: tuple[str, ...] = ("scope", "nonfinite")  # survive pickle and deepcopy

    nonfinite: str

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], *, scope: str, nonfinite: str, replica_group: Any
    ) -> None:
        self._configure(scope=scope, nonfinite=nonfinite, replica_group=replica_group)
        super().__init__(params, defaults)

    def _configure(self, *, scope: str, nonfinite: str, replica_group: Any = None) -> None:
        check_choice("scope", scope, SCOPES)
        check_choice("nonfinite", nonfinite, NONFINITE)
        self.scope, self.nonfinite = scope, nonfinite
        self._forget()
        self.replica_group = replica_group

    def _forget(self) -> None:
        """Attributes that live as long as this process: never in groups, state_dict, pickle or deepcopy."""
        self._forget_placement()
        self._present: tuple[tuple[bool, ...], Tensor] | None = None
        self._loading: tuple[dict[str, Any], list[dict[str, Any]]] | None = None
        self._scratch = Scratch()
        self._record = StepRecord()

    # ------------------------------------------------------------------ what a subclass says
    def _options(self, group: dict[str, Any]) -> Options:
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """Validate a group's options (defaults filled in); returns those to normalise."""
        raise NotImplementedError

    def _metric_numbers(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        """``root`` and ``floor`` of the metric, ``[rows]``; nothing for the identity."""
        return {}

    def _omega(self, decision: Decision, sums: Sums) -> Tensor:
        """``[rows]``, the weight of the gradient in d' = d + omega (g - d) / q."""
        return 1 - decision.beta

    def _check_loss(self, loss: Any, closure: Callable[[], Any] | None) -> None:
        """Refuse a closure that does not give what the step needs, before anything moves."""

    def _shared_sums(self, pieces: list[Piece], layout: Layout, loss: Any, like: Tensor) -> Tensor | None:
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
            0-dim tensors on the device, a snapshot, no host sync. Unnamed parameters are called ``group.index``.
        """
        return dict(zip(self.parameter_names(), self._betas().unbind(), strict=True))

    def caps(self) -> list[float]:
        """The cap of beta_t of each parameter, in the order of :meth:`parameter_names`."""
        return [float(self.param_groups[row.group_index][self.cap_key]) for row in self._rows()[0]]

    def report(self) -> Tensor:
        """``[parameters + 4]`` on the device: every beta_t, then what :class:`StepRecord` counts. No host sync."""
        betas = self._betas()
        return torch.cat([betas, self._record.numbers(betas)])

    def remember_grad_norm(self, norm: Tensor) -> None:
        """Keep the global gradient norm for :meth:`report`."""
        self._record.grad_norm = norm.detach()

    def _betas(self) -> Tensor:
        """``[parameters]`` beta_t, nan where one has never stepped."""
        params = [row.param for row in self._rows()[0]]
        device, dtype = sums_live_on(params)
        betas = self._stack(params, "beta", float("nan"), device, dtype)
        last = self._last_betas
        return betas if last is None or last.shape != betas.shape else torch.where(betas.isnan(), last, betas)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss; called first.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: a gradient is sparse or complex; nothing has moved.
        """
        self._check_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_loss(loss, closure)
        layout = self.current_layout()
        pieces = self._pieces(layout)
        params = [row.param for row in layout.rows]
        device, dtype = sums_live_on(params)
        scalars = self._scalars(params, device, dtype)
        numbers = Numbers(self._numbers(scalars))
        tiers = [tier(p, self.param_groups[layout.rows[p.row].group_index]["foreach"]) for p in pieces]
        passes = Passes(pieces, tiers, self._scratch)
        present = self._present_rows(pieces, len(params), device, dtype)
        first = present * (scalars["step"] == 0)
        packed = torch.cat([passes.sums(numbers, len(params), device, dtype), present[:, None], first[:, None]], 1)
        packed, shared = layout.all_reduce(packed, self._shared_sums(pieces, layout, loss, packed))
        sums = Sums.unpack(packed)
        decision = decide(
            sums,
            cap=scalars["cap"],
            lr=scalars["lr"],
            scope=self.scope,
            sizes=layout.sizes,
            first_takes_cap=self.first_takes_cap,
            nonfinite=self.nonfinite,
            pool=None if layout.pipeline_group is None else layout.pool,
            gap=self._known_gap(shared, scalars),
            gradients=self._gradients(shared),
        )
        numbers.add("omega", self._omega(decision, sums))
        passes.update(numbers, decision.counts)
        self._count(params, scalars, decision)
        self._record.observe(decision)
        self._after(decision, shared)
        return loss

    # ------------------------------------------------------------------ rows and their numbers
    def _check_capture(self) -> None:
        check = getattr(self, "_accelerator_graph_capture_health_check", None) or self._cuda_graph_capture_health_check
        if all("capturable" in group for group in self.param_groups):
            check()

    def _pieces(self, layout: Layout) -> list[Piece]:
        """The rows that have a gradient here. All are checked before the first state is made."""
        rows = [(i, row) for i, row in enumerate(layout.rows) if row.param.grad is not None]
        for _, row in rows:
            _check_gradient(row.param, row.name, type(self).__name__)
        options = [self._options(group) for group in self.param_groups]
        pieces = []
        for i, row in rows:
            state = self._row_state(row.param, self.param_groups[row.group_index])
            stored = (piece_of(row, tensor) for tensor in (row.param, *(state[key] for key in self.moments)))
            x, *moments = stored
            tensors = [x, gradient_of(row), *moments]
            if x.ndim == 0:  # a 0-dim operand would take the dtype of a 0-dim number
                tensors = [t.reshape(1) for t in tensors]
            x, g, d, *v = tensors
            pieces.append(Piece(i, x, g, d, v[0] if v else None, options[row.group_index]))
        return pieces

    def _row_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[param]
        if self.moments[0] not in state:  # an engine may have left an empty dict
            row_state.create(state, param, self.moments)
        else:
            cap = group[self.cap_key]
            row_state.complete(state, param, beta1=cap, lr=group["lr"], cap=cap)
        return state  # type: ignore[no-any-return]

    def _scalars(self, params: list[Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """``[rows]`` each: the state's scalars and the groups' options."""
        scalars = {
            key: self._stack(params, key, default, device, dtype)
            for key, default in (("step", 0.0), ("beta_prod", 1.0), ("beta", float("nan")), ("prev_lr", 0.0))
        }
        options = [self._options(group) for group in self.param_groups]
        scalars["cap"] = self._per_row([group[self.cap_key] for group in self.param_groups], device, dtype)
        scalars["lr"] = self._per_row([group["lr"] for group in self.param_groups], device, dtype)
        scalars["mu"] = self._per_row([o.mu for o in options], device, dtype)
        return scalars

    def _numbers(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        lr, mu = scalars["lr"], scalars["mu"]
        numbers = {"gap": 1 + gap_factor(lr, scalars["prev_lr"], mu), "lr": lr, "shrink": 1 - mu * lr}
        return numbers | self._metric_numbers(scalars)

    def _stack(
        self, params: list[Tensor], key: str, default: float, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """``[rows]``: a 0-dim state of every row."""
        missing = torch.full((), default, dtype=dtype, device=device)
        values = [self.state[p].get(key, missing) if p in self.state else missing for p in params]
        return torch.stack([v.to(device=device, dtype=dtype, non_blocking=True) for v in values])

    def _per_row(self, values: list[float | Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
        """``[rows]``: an option of every row's group. Host numbers are filled in on the device: no copy, no sync."""
        parts = []
        for value, size in zip(values, self._rows()[1], strict=True):
            rows = (size,)
            if isinstance(value, Tensor):
                parts.append(value.detach().reshape(1).to(device, dtype, non_blocking=True).expand(rows))
            else:
                parts.append(torch.full(rows, float(value), dtype=dtype, device=device))
        return torch.cat(parts)

    def _present_rows(self, pieces: list[Piece], rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """``[rows]``: 1 where this rank has a gradient. Kept until another set of rows has one."""
        here = {piece.row for piece in pieces}
        key = tuple(i in here for i in range(rows))
        if self._present is None or self._present[0] != key or self._present[1].device != device:
            self._present = (key, torch.tensor(key, device=device).to(dtype))
        return self._present[1]

    def _count(self, params: list[Tensor], scalars: dict[str, Tensor], decision: Decision) -> None:
        """Write the adaptive scalars of the rows that took part."""
        counts, beta = decision.counts, decision.beta
        last = torch.full_like(beta, float("nan")) if self._last_betas is None else self._last_betas
        self._last_betas = torch.where(counts, beta, last)
        new = {
            "step": scalars["step"] + counts,
            "beta_prod": torch.where(counts, scalars["beta_prod"] * beta, scalars["beta_prod"]),
            "beta": torch.where(counts, beta, scalars["beta"]),
            "prev_lr": torch.where(counts, scalars["lr"], scalars["prev_lr"]),
        }
        known = [i for i, p in enumerate(params) if self.state.get(p)]
        if not known:
            return
        for key, column in new.items():
            values = column.unbind()
            torch._foreach_copy_([self.state[params[i]][key] for i in known], [values[i] for i in known])

    # ------------------------------------------------------------------ groups, pickle, state_dict
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; its options are checked before anything changes."""
        checked = {}
        if isinstance(param_group, dict):
            for name in _WHOLE_OPTIMIZER:
                if name in param_group:
                    raise ValueError(f"Invalid {name} in a parameter group: {name} is an option of the whole optimizer")
            checked = self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self.param_groups[-1].update(checked)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__() | {name: getattr(self, name) for name in self.plain_attributes}
        return state | {_NAMES: self.parameter_names()} if self._known_names else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_record" not in self.__dict__:  # unpickled or copied
            self._forget()
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch.optim adds it
        if self._loading is not None:
            self._finish_loading(*self._loading)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            for key, value in self._check_group(group).items():
                group.setdefault(key, value)
        if _NAMES in self.__dict__:  # after a copy or unpickling the parameters are others, their places are not
            self._known_names = names_by_id(zip(self.__dict__.pop(_NAMES), self._parameters(), strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict`` of this class, or one of its plain counterpart (AdamW for AMAdamW) in mid-run.

        The cap stays this optimizer's, as do options that the checkpoint lacks.

        Raises:
            ValueError: it is the checkpoint of another optimizer or model; nothing has changed.
        """

        def remember(_: Optimizer, saved: dict[str, Any]) -> None:
            row_state.check_loadable(saved, self.param_groups, self.moments, type(self).__name__)
            live = [dict(group) for group in self.param_groups]
            for saved_group, live_group in zip(saved["param_groups"], live, strict=False):  # torch.optim counts them
                trial = dict(saved_group)
                row_state.restore_options(trial, live_group, self.cap_key)
                self._check_group(trial)
            self._loading = saved, live

        last = self.register_load_state_dict_pre_hook(remember)  # sees what the user's own hooks made of it
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            self._loading = None

    def _finish_loading(self, saved: dict[str, Any], live: list[dict[str, Any]]) -> None:
        for group, saved_group, live_group in zip(self.param_groups, saved["param_groups"], live, strict=True):
            row_state.restore_options(group, live_group, self.cap_key)
            cap = group[self.cap_key]
            beta1 = float(saved_group["betas"][0]) if "betas" in saved_group else cap
            for param, index in zip(group["params"], saved_group["params"], strict=True):
                if saved["state"].get(index):
                    row_state.restore_scalars(
                        self.state[param], saved["state"][index], param, beta1=beta1, lr=saved_group["lr"], cap=cap
                    )


def sums_live_on(params: list[Tensor]) -> tuple[torch.device, torch.dtype]:
    """Where the packed sums live: beside the first parameter, in the widest dtype of its device."""
    device = params[0].device if params else torch.device("cpu")
    return device, row_state.widest_dtype(device)


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
