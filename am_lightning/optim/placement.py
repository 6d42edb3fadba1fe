"""Which tensors an optimizer holds, what they are called, and how their sums are reduced over ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from am_lightning.names import names_by_id
from am_lightning.optim.validation import check_process_group
from am_lightning.sharding import Layout, Row, lay_out_rows
from am_lightning.sharding.zero_redundancy import inside_zero_redundancy


class PlacedOptimizer(Optimizer):
    """An optimizer that knows the logical tensors behind its parameters; its layout is built at the first step."""

    scope: str

    def _forget_placement(self) -> None:
        self._replica_group: Any = None
        self._pipeline_group: Any = None
        self._model: nn.Module | None = None
        self._known_names: dict[int, str] = {}
        self._layout: Layout | None = None
        self._layout_ids: list[int] = []
        self._last_betas: Tensor | None = None  # of the layout's rows; a rank without elements has no state to ask

    @property
    def replica_group(self) -> Any:
        """Process group whose ranks hold the same parameters (DDP); the first one's sums serve all. Not saved."""
        return self._replica_group

    @replica_group.setter
    def replica_group(self, group: Any) -> None:
        check_process_group("replica_group", group)
        self._replica_group = group
        self._forget_layout()

    @property
    def pipeline_group(self) -> Any:
        """Process group of one rank of each pipeline stage, this one included. Not saved.

        With it ``scope="global"`` (and "group") sums over the stages and a step that one stage skips is skipped by all,
        for one more small collective a step; without it only ``scope="tensor"`` serves a pipeline.
        """
        return self._pipeline_group

    @pipeline_group.setter
    def pipeline_group(self, group: Any) -> None:
        check_process_group("pipeline_group", group)
        self._pipeline_group = group
        self._forget_layout()

    def name_parameters(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Give unnamed parameters the names of ``module.named_parameters()``, for :meth:`momentum` and messages."""
        self._known_names = names_by_id(named_parameters)
        self._forget_layout()

    def bind_model(self, model: nn.Module) -> None:
        """Give the optimizer the module whose parameters it has: their names, and FSDP1's process groups.

        The callback and the ``attach`` functions do so. Not saved.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"Invalid model: {type(model).__name__} (model must be a torch.nn.Module)")
        self._model = model
        self.name_parameters(model.named_parameters())

    def parameter_names(self) -> list[str]:
        """The distinct name of each parameter, in the order of the groups, as :meth:`momentum` uses them.

        A flat parameter (FSDP1 with ``use_orig_params=False``) has the names of the tensors in it.
        """
        return [row.name for row in self._rows()[0]]

    def _rows(self) -> tuple[list[Row], list[int]]:
        """Rows, and how many of each group; known before the layout is built, without a collective."""
        if self._layout is not None and self._layout_ids == [id(p) for p in self._parameters()]:
            return self._layout.rows, self._layout.sizes
        return lay_out_rows(self.param_groups, model=self._model, known_names=self._known_names)

    def _parameters(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def current_layout(self) -> Layout:
        """Rows and reductions. Built (collectively) at the first step, and again when the parameters are others."""
        ids = [id(param) for param in self._parameters()]
        if self._layout is None or ids != self._layout_ids:
            alone = inside_zero_redundancy(self)
            self._forget_layout()
            layout = Layout.build(
                self.param_groups,
                model=self._model,
                replica_group=self._replica_group,
                pipeline_group=self._pipeline_group,
                known_names=self._known_names,
                others_hold_the_rest=alone,
            )
            self._check_scope(layout, alone)
            self._layout, self._layout_ids = layout, ids
        return self._layout

    def _forget_layout(self) -> None:
        self._layout = self._last_betas = None

    def _check_scope(self, layout: Layout, alone: bool) -> None:
        """Refuse a scope whose sums this layout cannot form, before anything moves."""
        if self.scope == "tensor":
            self._refuse_flat(layout)
            return
        if alone:
            raise ValueError(
                f"scope={self.scope!r} cannot be formed inside ZeroRedundancyOptimizer: each rank's optimizer sees "
                "only that rank's tensors, and is stepped without the others. Use scope='tensor', or FSDP"
            )
        layout.check_whole_model(f"scope={self.scope!r}")

    def _refuse_flat(self, layout: Layout) -> None:
        """A flat parameter has one 0-dim state, not one for each of its tensors, and FSDP1 saves no more than that."""
        rows: dict[int, str] = {}
        for row in layout.rows:
            if id(row.param) in rows:
                raise ValueError(
                    f"parameters {rows[id(row.param)]!r} and {row.name!r} are in one flat parameter (FSDP1 with "
                    "use_orig_params=False), which has one state for both: scope='tensor' cannot be saved and resumed. "
                    "Set use_orig_params=True (Lightning: the default; Accelerate: fsdp_use_orig_params: true), or use "
                    "scope='global' or 'group'"
                )
            rows[id(row.param)] = row.name
