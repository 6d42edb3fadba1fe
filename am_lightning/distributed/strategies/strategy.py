"""The interface of a way to spread parameters over ranks: what sums over whole tensors need to know."""

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
    """What is known beside the optimizer's parameters.

    Attributes:
        model: the module that holds them, as it is trained.
        replaced: for each parameter group, the given parameters that an engine has replaced by flat partitions.
        all_replaced: those of all groups; empty: nothing was replaced.
    """

    model: nn.Module | None = None
    replaced: Sequence[NamedParams] = ()
    all_replaced: NamedParams = ()


@dataclass(frozen=True, eq=False)
class LogicalParam:
    """What a model calls one parameter: this process's shard of it, and whether that counts in the reduced sums.

    Attributes:
        param: the parameter that the optimizer has, which may be a flat one of several tensors.
        group_index: of its parameter group; not the group itself, because load_state_dict replaces the dicts.
        name: distinct among all.
        shard: where its elements live among the ranks.
        strategy: what has placed it.
        is_owner: this rank's elements count in the sums; False where another rank counts them.
        span: its elements in this rank's part of ``param``; None: all of them.
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
        """It has its own adaptive scalars within a flat parameter, kept by name."""
        return self.strategy.partitioned


@dataclass(frozen=True)
class Demand:
    """What an optimizer asks of its layout.

    Attributes:
        scope: "tensor", "group" or "global".
        exact_sums: sums and not only their ratio decide beta_t.
        whole_step: the sums of all ``step()`` calls of a training step are known in the first of them.
        group_names: the names of the tensors that each group was given.
    """

    scope: str
    exact_sums: bool
    whole_step: bool
    group_names: Sequence[Sequence[str]]


class Strategy:
    """One way to spread parameters over ranks; an instance serves one set of parameter groups.

    A new one is a file with a subclass, and a line in ``STRATEGIES``. It needs ``holds`` and ``slices``;
    by the defaults of the rest it refuses nothing.

    Class attributes:
        name: for messages.
        one_state_dtype: saves the states of many tensors as one, so that they must have one dtype.
        partitioned: the tensors in a parameter each have their own adaptive scalars, which are kept by name.
        engine: the package that replaces given parameters by flat partitions.
        clipping: how gradients are clipped where the engine holds them.
    """

    name: ClassVar[str]
    one_state_dtype: ClassVar[bool] = False
    partitioned: ClassVar[bool] = False
    engine: ClassVar[str | None] = None
    clipping: ClassVar[str] = ""

    def __init__(self, surroundings: Surroundings) -> None:
        """Keep what ``holds`` and ``slices`` need."""

    def holds(self, param: Tensor) -> bool:
        """This strategy has placed ``param``."""
        raise NotImplementedError

    def slices(self, param: Tensor, name: str, group_index: int) -> list[TensorSlice]:
        """The logical tensors in ``param``, the same list on every rank.

        Raises:
            ValueError: they cannot be found, or are placed so that sums over their elements cannot be formed.
        """
        raise NotImplementedError

    @classmethod
    def replaces(cls, given: Tensor) -> bool:
        """``given``, a parameter that the optimizer was given, is replaced by a flat partition."""
        return False

    @classmethod
    def steps(cls, param_groups: ParamGroups) -> bool:
        """An engine of this strategy up the stack steps the optimizer that has these groups."""
        return False

    @classmethod
    def replicas(cls) -> Any:
        """Process group of the ranks whose gradients an engine up the stack has averaged, or None."""
        return None

    @classmethod
    def check_engine(
        cls, param_groups: ParamGroups, given: GivenParams, model: nn.Module | None, *, attached: bool, replaced: bool
    ) -> None:
        """Refuse an engine that is not supported.

        Args:
            attached: an adapter has looked at the engine itself; otherwise it is searched for up the stack.
            replaced: flat partitions have replaced the given parameters.

        Raises:
            ValueError: on every rank alike.
        """

    @classmethod
    def check_demand(cls, params: Sequence[LogicalParam], demand: Demand) -> None:
        """Refuse sums over ``params`` that cannot be formed, or whose states cannot be saved.

        Raises:
            ValueError: on every rank alike.
        """

    @classmethod
    def check_exact(cls, params: Sequence[LogicalParam]) -> None:
        """Refuse sums in which an element might count more than once, because copies of it are not known.

        Raises:
            ValueError: on every rank alike.
        """

    @classmethod
    def cover(cls, shards: Sequence[ShardInfo]) -> Cover | None:
        """One reduction that serves all ``shards``, or None."""
        return None

    @classmethod
    def logical_ndims(cls, root: nn.Module) -> dict[int, int]:
        """``id(parameter) -> ndim`` of the whole tensor, where the parameter shows another.

        Raises:
            ValueError: that is not known.
        """
        return {}
