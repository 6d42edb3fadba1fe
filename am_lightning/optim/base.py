"""The base class of AMAdamW and AMSGD: one step of adaptive memory, and the public methods of the optimizers."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from am_lightning.distributed import ShardLayout
from am_lightning.optim import checkpointing, group_checks, param_state
from am_lightning.optim.closed_form import Decision, RowOptions, Sums, coefficients, decide
from am_lightning.optim.kernels.agreement import agree_on_kernels, drop_fused, row_kernels
from am_lightning.optim.kernels.inputs import GroupOptions
from am_lightning.optim.kernels.plan import KernelPlan, choice_of, step_tensors
from am_lightning.optim.kernels.transfer import refuse_in_capture
from am_lightning.optim.kernels.triton.row_launch import RowKernels
from am_lightning.optim.kernels.workspace import Workspace
from am_lightning.optim.param_layout import ParamLayout, checked_params_of
from am_lightning.optim.state_store import StateStore
from am_lightning.optim.step_inputs import StepInputs, finish_in_kernels, inputs_in_kernels
from am_lightning.optim.step_stats import StepStats
from am_lightning.optim.validation import NONFINITE, SCOPES, check_choice

_F = TypeVar("_F", bound=Callable[..., Any])


def outside_graphs(function: _F) -> _F:
    """Apply ``torch.compiler.disable`` at the first call, because it imports the compiler."""
    disabled: list[Any] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return cast(_F, call)


class AdaptiveMemoryOptimizer(Optimizer):
    """Base class of the adaptive memory optimizers. A subclass defines its preconditioner, state and options."""

    cap_key: str  # group option that holds the cap of beta_t
    moments: tuple[str, ...]  # state tensors shaped like the parameter, the direction d first
    first_takes_cap: bool  # beta_t is the cap in a parameter's own first step
    plain_attributes: tuple[str, ...] = ("scope", "nonfinite")  # attributes that survive pickle and deepcopy

    nonfinite: str
    needs_exact_sums = False  # True: beta_t depends on the sums themselves, not only on their ratio
    exp_avg_dtype: torch.dtype | None = None  # dtype of the direction d; None: the parameter's dtype
    fused_dropped: bool | None = None  # whether convert_adamw removed fused=True here; None: no group had it

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], *, scope: str, nonfinite: str, replica_group: Any
    ) -> None:
        group_checks.refuse_module(params)
        self.configure(scope=scope, nonfinite=nonfinite, replica_group=replica_group)
        super().__init__(params, defaults)

    def configure(self, *, scope: str, nonfinite: str, replica_group: Any = None) -> None:
        """Set everything except parameters and groups. ``convert_adamw`` calls it on an optimizer that has both."""
        check_choice("scope", scope, SCOPES)
        check_choice("nonfinite", nonfinite, NONFINITE)
        self.scope, self.nonfinite = scope, nonfinite
        self._forget()
        self.replica_group = replica_group

    def _forget(self) -> None:
        """Reset the attributes that belong to this process and are never saved, pickled or copied."""
        self._store = StateStore(self.moments, self.cap_key)
        self._stats = StepStats()
        self._workspace = Workspace()
        self._plans: dict[ShardLayout, KernelPlan] = {}  # the plan of each layout's last step
        self._plan: KernelPlan | None = None  # the plan of the last step
        self._row_kernels: dict[ShardLayout, RowKernels | None] = {}  # cleared when an option changes
        self._checked_options: list[Any] = []
        self._loading: tuple[dict[str, Any], list[dict[str, Any]]] | None = None
        self.param_layout = ParamLayout()
        self.pre_pass: Callable[[ShardLayout], Decision] | None = None  # set by the DeepSpeed integration

    # ------------------------------------------------------------------ defined by subclasses
    def _check_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """Validate a group's options, defaults included. Returns the options whose values have to be normalised."""
        raise NotImplementedError

    def _group_options(self, group: dict[str, Any]) -> GroupOptions:
        raise NotImplementedError

    def _row_options(self, group: dict[str, Any]) -> RowOptions:
        """The options of one group, as Python numbers or one-element tensors."""
        raise NotImplementedError

    # ------------------------------------------------------------------ the step
    @outside_graphs  # torch.compile would split the step into many graphs and recompile them when numbers change
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step. ``torch.compile`` does not trace it.

        Args:
            closure: a function that reevaluates the model and returns the loss, which ``step`` returns. Called first.

        Raises:
            RuntimeError: if a gradient is sparse or complex, or a state has a bad scalar; no parameter has changed.
            ValueError: if the sums cannot be formed for the layout or scope; raised on every rank at the first step.
        """
        if not self.state and checkpointing.only_makes_states(self):
            return None
        self._check_options()
        loss = self._evaluate(closure)
        layout = self.param_layout.find(self.param_groups) or self._build_layout()
        # DeepSpeed calls step() for some of the parameters at a time, so the first call forms the sums of all of them
        decision, shared = None if self.pre_pass is None else self.pre_pass(layout), None
        local = self.prepare(layout)  # this step's tensors, their kernels and coefficients
        if decision is None:
            packed, shared = self._reduce(self.local_sums(local), layout, loss)  # the one collective
            if local.in_kernels is not None:
                finish_in_kernels(local, packed, self._stats, layout, skip=self.nonfinite == "skip")
                return loss
            sums = Sums.unpack(packed)
            stages = layout.stage_reduction
            decision = self.decide(sums, local.options, layout.sizes, shared, reduce_over_stages=stages)
        local.coefficients["omega"] = decision.omega
        local.plan.update(local.coefficients, decision.active)
        local.store.write(local.scalars.advanced(decision, local.options.lr), decision.active)
        if shared is not None:
            self._remember(shared, decision)
        positions = layout.positions_in(self.parameter_names()) if layout.partitioned else None
        tally, again = self._stats.tally_of(layout, decision.beta), layout is not self.param_layout.first
        self._stats.observe(decision, local.options.beta_max, tally, positions, again=again)
        return loss

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        check = getattr(self, "_accelerator_graph_capture_health_check", None) or self._cuda_graph_capture_health_check
        if all("capturable" in group for group in self.param_groups):
            check()
        if closure is None:
            return None
        with torch.enable_grad():
            loss = closure()
        self._check_options()  # Lightning runs the training step in the closure, which may change options
        return loss

    def prepare(self, layout: ShardLayout) -> StepInputs:
        """Collect the inputs of a step on ``layout``. It only reads, except that it creates missing states."""
        moments = partial(self._store.moments, self.state, self.param_groups, self.exp_avg_dtype)
        tensors = step_tensors(layout, moments, type(self).__name__)
        groups = self.param_groups
        of_groups = [(self._group_options(group), choice_of(group)) for group in groups]
        of_rows = [of_groups[layout.logical_params[row].group_index] for row in tensors.rows]
        plan = self._plan = self._plans.get(layout)
        if plan is None or plan.made_for != (tensors.kinds(), of_rows):
            plan = self._plan = self._plans[layout] = KernelPlan(tensors, of_rows, self._workspace, layout)
        options = [self._row_options(group) for group in groups]
        store, workspace = self._store.scalars(self.state, layout, groups, type(self).__name__), self._workspace
        clip, workspace.gradient_clip = workspace.gradient_clip, None
        if layout not in self._row_kernels:
            found = row_kernels(layout, groups, self.scope, store, workspace) if len(self.moments) > 1 else None
            self._row_kernels[layout] = found  # the row kernels do not implement AMSGD's rule
        in_kernels = self._row_kernels[layout]
        if in_kernels is not None and self.pre_pass is None:
            inputs = inputs_in_kernels(plan, store, in_kernels, options, clip, workspace)
        else:
            scalars, over_rows = store.read(), plan.over_rows(options, layout.sizes)
            columns = coefficients(scalars, over_rows, second_moment=len(self.moments) > 1)
            inputs = StepInputs(plan, columns, store, scalars, over_rows, None)
            workspace.gradient_factor = None if clip is None else clip.factor()
        plan.begin(tensors, in_kernels)
        return inputs

    def local_sums(self, local: StepInputs) -> Tensor:
        """Run pass 1. Returns ``[rows, 4]``: N, D, and whether there is a gradient here and it is the first."""
        sums = local.plan.sums(local.coefficients)
        if local.in_kernels is not None:
            return torch.cat([sums, local.in_kernels.found.tail], 1)
        first = local.plan.present * (local.coefficients["step"] == 0)
        return torch.cat([sums, local.plan.present[:, None].to(sums), first[:, None].to(sums)], 1)

    def _reduce(self, packed: Tensor, layout: ShardLayout, loss: Any) -> tuple[Tensor, Any]:
        """Sum over ranks. Returns the sums, and anything else that a subclass reduces with them."""
        return (layout.all_reduce(packed)[0] if layout.reductions else packed), None

    def _remember(self, shared: Any, decision: Decision) -> None:
        """Keep what the next step needs from the second result of ``_reduce``."""

    def decide(
        self, sums: Sums, options: RowOptions, sizes: Sequence[int], shared: Any = None, **known: Any
    ) -> Decision:
        """Compute beta_t from the reduced sums; ``sizes`` is the number of rows in each group."""
        rule: dict[str, Any] = {
            "scope": self.scope,
            "first_takes_cap": self.first_takes_cap,
            "nonfinite": self.nonfinite,
        }
        return decide(sums, cap=options.beta_max, lr=options.lr, sizes=sizes, **rule, **known)

    # ------------------------------------------------------------------ public methods
    @property
    def last_step_skipped(self) -> Tensor:
        """Whether the last step was skipped because a sum was not finite: a 0-dim bool on the device of the sums."""
        return self._stats.skipped.clone()

    def momentum(self) -> dict[str, Tensor]:
        """Return each parameter's beta_t of the last step in which it took part (nan before its first), by name.

        Returns:
            A snapshot of 0-dim tensors in [0, cap] on the device, in float64 if the device has it. There is no host
            sync. Unnamed parameters are called ``group.index``.
        """
        return dict(zip(self.parameter_names(), self._betas().unbind(), strict=True))

    def report(self) -> Tensor:
        """Return ``[parameters + 4]`` on the device: every beta_t, then ``StepStats.numbers``. No host sync."""
        return torch.cat([betas := self._betas(), self._stats.numbers(betas)])

    def begin_interval(self, reader: Any, *, unread: bool = False) -> None:
        """Begin an interval of ``reader`` (held weakly). ``unread`` includes earlier steps that no reader has read."""
        self._stats.begin_interval(reader, unread=unread)

    def interval(self, reader: Any) -> Tensor:
        """Return the ``Interval`` since ``reader`` last called it: ``[6, parameters]`` on the device. No host sync."""
        return self._stats.interval(reader, self.parameter_names())

    def _betas(self) -> Tensor:
        """``[parameters]``: beta_t, nan for a parameter that has never stepped."""
        if self.is_partitioned():
            return self._store.betas_by_name(self.parameter_names())
        layout = self.param_layout.find(self.param_groups)
        params = self.param_layout.logical_params(self.param_groups)
        return self._store.betas(self.state, layout, params)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all optimized parameters, as in torch.optim."""
        self._workspace.gradient_clip = None
        super().zero_grad(set_to_none)

    def groups_of_parameters(self) -> list[dict[str, Any]]:
        """Return the group of each parameter, in the order of ``parameter_names``."""
        self._check_options()
        return self.param_layout.groups_of(self.param_groups)

    def caps(self) -> list[float]:
        """Return the cap of beta_t of each parameter, in the order of ``parameter_names``."""
        return [float(group[self.cap_key]) for group in self.groups_of_parameters()]

    # ------------------------------------------------------------------ groups
    def _check_options(self) -> None:
        """Complete and check groups that were replaced or changed. An error names the group by its number."""
        found: list[Any] = []  # without parameters, because keeping old ones alive could keep a whole model alive
        try:
            for group in self.param_groups:
                found += [group, type(group["params"]), *[value for key, value in group.items() if key != "params"]]
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # checked below
            found = [object()]
        if len(found) == len(self._checked_options) and all(map(operator.is_, found, self._checked_options)):
            return
        checkpointing.take_tables(self)
        complete = partial(group_checks.complete_groups, defaults=self.defaults, check=self._check_group)
        if group_checks.complete_foreign_groups(self.param_groups, {*self.defaults, self.cap_key}, complete):
            self.param_layout.given.remember(self.param_groups)
        for index, group in enumerate(self.param_groups):
            with group_checks.naming_group(index):
                self._check_group(group_checks.as_unread(group, self.cap_key))
        self._checked_options = found  # it lacks the options filled in above, so the next step checks once more
        self._row_kernels = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group. Its options are checked before anything changes."""
        checked = {}
        if isinstance(param_group, dict):
            param_group = group_checks.without_whole_options(param_group, self)
            checked = self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self.param_groups[-1].update(checked)
        self.param_layout.given.remember(self.param_groups)

    # ------------------------------------------------------------------ layouts
    @property
    def replica_group(self) -> Any:
        """Process group of ranks with the same parameters (DDP), else TypeError. All use its first rank's sums."""
        return self.param_layout.replica_group

    @replica_group.setter
    def replica_group(self, group: Any) -> None:
        self.param_layout.replica_group = group
        self._forget_plans()

    @property
    def pipeline_group(self) -> Any:
        """Process group with one rank of each pipeline stage, this rank included, or None; else TypeError. Not saved.

        With it ``scope="global"`` and "group" sum over the stages, and all stages skip a step that one of them skips,
        at the cost of one small collective per step. Without it a pipeline can only use ``scope="tensor"``.
        """
        return self.param_layout.pipeline_group

    @pipeline_group.setter
    def pipeline_group(self, group: Any) -> None:
        self.param_layout.pipeline_group = group
        self._forget_plans()

    def name_parameters(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Name unnamed parameters by ``module.named_parameters()``. Names of other parameters are ignored."""
        self.param_layout.name_parameters(named_parameters)
        self._forget_plans()

    def bind_model(self, model: torch.nn.Module) -> None:
        """Take parameter names and FSDP1's process groups from the module that holds the parameters. Not saved.

        The callback and the ``attach`` functions call this.

        Args:
            model: the outermost module, as it is trained (wrapped by FSDP or DDP). Anything else raises TypeError.
        """
        self.param_layout.bind_model(model)
        self._forget_plans()

    def parameter_names(self) -> list[str]:
        """Return the distinct names in the order of the groups. A flat parameter has the names of its tensors."""
        return self.param_layout.names(self.param_groups)

    def given_groups(self) -> list[dict[str, Any]]:
        """Return every group that was given parameters, even while an engine shows only some of them."""
        return self.param_layout.given.filled_groups()

    def is_partitioned(self) -> bool:
        """Return whether ZeRO has replaced the given parameters by flat partitions of its own."""
        return self.param_layout.engine(self.param_groups) is not None

    @property
    def layout(self) -> ShardLayout | None:
        """Logical parameters and reductions of the last step, or None before the first step. Not collective."""
        return self.param_layout.last

    def describe(self) -> str:
        """Describe the tensors, reductions and kernels of the steps so far, for each ``step()`` call of an engine."""
        text = "; then ".join(layout.describe() for layout in self.param_layout.layouts.values())
        return f"{text}{self._plan.describe() if self._plan else ''}" if text else "no step made yet"

    def current_layout(self) -> ShardLayout:
        """Return the layout of the current parameters. Builds it (collectively) if it is missing or out of date."""
        self._check_options()
        return self.param_layout.find(self.param_groups) or self._build_layout()

    def _build_layout(self) -> ShardLayout:
        for param in checked_params_of(self.param_groups):  # building needs copies, collectives and compilation
            refuse_in_capture(param)
        if not self.is_partitioned():
            self._forget_plans()
        return self.param_layout.build(self.param_groups, self._check_layout)

    def _forget_plans(self) -> None:
        self._store.forget_layouts()
        self._stats.forget_layouts()
        self._plans, self._row_kernels = {}, {}

    def _check_layout(self, layout: ShardLayout) -> None:
        """Raise an error, before anything changes, if the scope's sums cannot be formed; then agree on kernels."""
        whole_step = self.pre_pass is not None
        self.param_layout.check_scope(layout, self.scope, exact_sums=self.needs_exact_sums, whole_step=whole_step)
        group_checks.warn_of_cycled_momentum(self.param_groups, self.cap_key)
        param_state.check_direction(self.exp_avg_dtype, layout.logical_params)
        before = set(self._workspace.fused_by_default)
        if not agree_on_kernels(layout, self.param_groups, self._workspace, self.fused_dropped, self.exp_avg_dtype):
            drop_fused([*self.param_groups, self.defaults])
        if self._workspace.fused_by_default != before:
            self._plans, self._row_kernels = {}, {}  # one layout decides for all
        param_state.follow(self.state, [logical.param for logical in layout.logical_params])

    # ------------------------------------------------------------------ pickle, state_dict
    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__() | {name: getattr(self, name) for name in self.plain_attributes}
        return checkpointing.with_names(self, state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        with checkpointing.undone_if_it_fails(self):
            checkpointing.take_state(self, state, super().__setstate__)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict`` of this class, or one that its plain counterpart (AdamW for AMAdamW) saved mid-run.

        The optimizer keeps its own cap, and its own value of every option that the checkpoint lacks.

        Raises:
            ValueError: if it is not a state dict, or belongs to another optimizer or model. The message names the
                parameter or the group, and nothing has changed.
        """
        with checkpointing.checked_load(self, state_dict):
            super().load_state_dict(state_dict)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as in torch.optim; the groups of flat parameters hold the adaptive scalars by name."""
        saved = super().state_dict()
        checkpointing.save_tables(self, saved["param_groups"])
        return saved
