"""The interface of the strategies that distribute parameters over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from am_lightning.distributed.given_params import GivenParams, NamedParams, ParamGroups
from am_lightning.distributed.shard import Groups, ShardInfo, TensorSlice

Cover = tuple[frozenset[int], Callable[[], Groups]]  # ranks, and the process groups whose product they are


@dataclass(frozen=True, eq=False)
class Surroundings:
    """The model and the replaced parameters that belong to the optimizer's parameters.

    Attributes:
        model: the trained module that holds the parameters. None: unknown.
        replaced: the given parameters of each group that an engine has replaced by flat partitions.
        all_replaced: the replaced parameters of all groups, empty if nothing was replaced.
    """

    model: nn.Module | None = None
    replaced: Sequence[NamedParams] = ()
    all_replaced: NamedParams = ()


@dataclass(frozen=True, eq=False)
class LogicalParam:
    """One parameter of the model, this process's shard of it, and whether the shard counts in the reduced sums.

    Attributes:
        param: the optimizer's parameter, which may be a flat parameter of several tensors.
        group_index: index of its parameter group. The group itself is not kept because load_state_dict replaces it.
        name: distinct name.
        shard: placement of its elements among the ranks.
        strategy: class of the strategy that has placed it.
        is_owner: whether this rank's elements count in the sums. False if another rank counts them. Default: True.
        span: its elements in this rank's part of ``param``. None: all elements.
    """

    param: Tensor
    group_index: int
    name: str
    shard: ShardInfo
    strategy: type[Strategy]
    is_owner: bool = True
    span: slice | None = None

    @property
    def partitioned(self) -> bool:
        """Whether it has its own adaptive scalars within a flat parameter, which are kept by name."""
        return self.strategy.partitioned


@dataclass(frozen=True)
class Demand:
    """The requirements of an optimizer on its layout.

    Attributes:
        scope: "tensor", "group" or "global".
        exact_sums: whether beta_t depends on the sums themselves and not only on their ratio.
        whole_step: whether the first ``step()`` call of a training step knows the sums of all its ``step()`` calls.
        group_names: names of the tensors that each group was given.
    """

    scope: str
    exact_sums: bool
    whole_step: bool
    group_names: Sequence[Sequence[str]]


class Strategy:
    """Base class of the strategies. An instance serves one set of parameter groups.

    To add a strategy, write a subclass in its own file and add it to ``STRATEGIES``. It must define ``holds`` and
    ``slices``. The other methods accept everything by default.

    Class attributes:
        name: name for messages.
        one_state_dtype: whether the states of many tensors are saved as one, so that they must have one dtype.
        partitioned: whether each tensor in a parameter has its own adaptive scalars, which are kept by name.
        engine: package that replaces given parameters by flat partitions. None: there is none.
        clipping: how to clip gradients if the engine holds them.
    """

    name: ClassVar[str]
    one_state_dtype: ClassVar[bool] = False
    partitioned: ClassVar[bool] = False
    engine: ClassVar[str | None] = None
    clipping: ClassVar[str] = ""

    def __init__(self, surroundings: Surroundings) -> None:
        """Keep what ``holds`` and ``slices`` need."""

    def holds(self, param: Tensor) -> bool:
        """Return whether this strategy has placed ``param``."""
        raise NotImplementedError

    def slices(self, param: Tensor, name: str, group_index: int) -> list[TensorSlice]:
        """Return the logical tensors in ``param``, the same list on every rank.

        Raises:
            ValueError: if they cannot be found, or their placement does not allow sums over their elements.
        """
        raise NotImplementedError

    @classmethod
    def replaces(cls, given: Tensor) -> bool:
        """Return whether a flat partition replaces ``given``, a parameter that the optimizer was given."""
        return False

    @classmethod
    def steps(cls, param_groups: ParamGroups) -> bool:
        """Return whether an engine of this strategy up the stack steps the optimizer that has these groups."""
        return False

    @classmethod
    def replicas(cls) -> Any:
        """Return the process group over which an engine up the stack has averaged the gradients, or None."""
        return None

    @classmethod
    def check_engine(
        cls, param_groups: ParamGroups, given: GivenParams, model: nn.Module | None, *, attached: bool, replaced: bool
    ) -> None:
        """Check that the engine is supported.

        Args:
            param_groups: parameter groups of the optimizer.
            given: parameters that the groups were given.
            model: the trained module. None: unknown.
            attached: whether an adapter has checked the engine itself. If not, it is searched up the stack.
            replaced: whether flat partitions have replaced the given parameters.

        Raises:
            ValueError: on every rank, if the engine is not supported.
        """

    @classmethod
    def check_demand(cls, params: Sequence[LogicalParam], demand: Demand) -> None:
        """Check that the sums over ``params`` can be formed and their states saved.

        Raises:
            ValueError: on every rank, if they cannot.
        """

    @classmethod
    def check_exact(cls, params: Sequence[LogicalParam]) -> None:
        """Check that the sums count each element once.

        Raises:
            ValueError: on every rank, if copies of an element are not known.
        """

    @classmethod
    def cover(cls, shards: Sequence[ShardInfo]) -> Cover | None:
        """Return one reduction that serves all ``shards``, or None."""
        return None

    @classmethod
    def logical_ndims(cls, root: nn.Module) -> dict[int, int]:
        """Return ``id(parameter) -> ndim`` of the whole tensor, for parameters whose own ndim differs.

        Raises:
            ValueError: if the ndim is not known.
        """
        return {}
