"""Support lightning and pytorch_lightning, which are one framework in two packages with separate classes.

Only this module knows the packages' names. Each name that it exports stands for the class of every package that is
loaded. A package that the program does not use is not imported, because the package that is imported last redirects the
messages of both to its own logger.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, TypeVar, cast

from am_lightning.optional_imports import cause_of

Kind = TypeVar("Kind")

_HOMES = (("lightning.pytorch", "lightning.fabric"), ("pytorch_lightning", "lightning_fabric"))
_TO_INSTALL = (
    "needs lightning or pytorch-lightning: pip install 'am-lightning[lightning]' (or '[pytorch-lightning]'), or "
    "'.[lightning]' in a checkout"
)


def _import_one() -> None:
    """Import a package if none is loaded yet. lightning-fabric alone is enough for ``attach``."""
    if any(home in sys.modules for homes in _HOMES for home in homes):
        return
    broken: ImportError | None = None
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning_fabric"):
        try:
            importlib.import_module(name)
            return
        except ImportError as error:
            broken = broken or cause_of(error, name.partition(".")[0])
    raise ImportError(f"am_lightning.lightning {_TO_INSTALL}") from broken


_import_one()
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn  # noqa: E402

__all__ = [
    "Callback",
    "Fabric",
    "TensorBoardLogger",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "FabricDDPStrategy",
    "FabricDeepSpeedStrategy",
    "FSDPPrecision",
    "MisconfigurationException",
    "ModelParallelStrategy",
    "Precision",
    "join",
    "loaded",
    "rank_zero_info",
    "rank_zero_warn",
]


class _Either:
    """Stand for a class of both packages in ``isinstance(thing, ...)`` and in ``raise``.

    Args:
        path: path of the class: ``pytorch.strategies.DDPStrategy`` stands for
            ``lightning.pytorch.strategies.DDPStrategy`` and ``pytorch_lightning.strategies.DDPStrategy``.
    """

    def __init__(self, path: str) -> None:
        which, _, rest = path.partition(".")
        module, _, self._name = f".{rest}".rpartition(".")
        self._modules = [homes[which == "fabric"] + module for homes in _HOMES]

    def loaded(self) -> tuple[type, ...]:
        """Return the class of each package that is loaded."""
        kinds = (getattr(sys.modules.get(module), self._name, None) for module in self._modules)
        return tuple(kind for kind in kinds if kind is not None)

    def __instancecheck__(self, thing: object) -> bool:
        return isinstance(thing, self.loaded())

    def __call__(self, *arguments: object) -> Any:
        """Return an instance of the classes of all loaded packages, so that either package's ``except`` catches it."""
        kinds = self.loaded()
        return (kinds[0] if len(kinds) == 1 else type(self._name, kinds, {}))(*arguments)


def loaded(kind: type[Kind]) -> tuple[type[Kind], ...]:
    """Return the classes that a name exported here stands for."""
    return cast(_Either, kind).loaded()


if TYPE_CHECKING:
    import lightning.pytorch
    import lightning_fabric.loggers.logger
    import pytorch_lightning
    from lightning.fabric import Fabric
    from lightning.fabric.loggers.tensorboard import TensorBoardLogger
    from lightning.fabric.strategies.ddp import DDPStrategy as FabricDDPStrategy
    from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy as FabricDeepSpeedStrategy
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.plugins.precision import FSDPPrecision, Precision
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

    Trainer = lightning.pytorch.Trainer | pytorch_lightning.Trainer
    LightningModule = lightning.pytorch.LightningModule | pytorch_lightning.LightningModule
    Logger = lightning.fabric.loggers.logger.Logger | lightning_fabric.loggers.logger.Logger

    class Callback(lightning.pytorch.Callback, pytorch_lightning.Callback): ...  # type: ignore[misc]

else:
    Fabric = _Either("fabric.Fabric")
    TensorBoardLogger = _Either("fabric.loggers.TensorBoardLogger")
    FabricDDPStrategy = _Either("fabric.strategies.DDPStrategy")
    FabricDeepSpeedStrategy = _Either("fabric.strategies.DeepSpeedStrategy")
    MisconfigurationException = _Either("fabric.utilities.exceptions.MisconfigurationException")
    Precision = _Either("pytorch.plugins.precision.Precision")
    FSDPPrecision = _Either("pytorch.plugins.precision.FSDPPrecision")
    DDPStrategy = _Either("pytorch.strategies.DDPStrategy")
    DeepSpeedStrategy = _Either("pytorch.strategies.DeepSpeedStrategy")
    FSDPStrategy = _Either("pytorch.strategies.FSDPStrategy")
    ModelParallelStrategy = _Either("pytorch.strategies.ModelParallelStrategy")

    class _Base:
        """A base that ``__bases__`` can replace, which Python does not allow for ``object``."""

    class Callback(_Base):
        """A Callback of every loaded package. A package that is loaded later is added when the class is next used."""

        def __init_subclass__(cls, **options: Any) -> None:
            super().__init_subclass__(**options)
            join()

        def __new__(cls, *arguments: Any, **options: Any) -> Any:
            join()
            if Callback.__bases__ == (_Base,):
                raise ImportError(f"{cls.__name__} {_TO_INSTALL}")
            return super().__new__(cls)


def join() -> None:
    """Make ``Callback`` a subclass of the Callback of every package that is loaded now."""
    kinds = _Either("pytorch.Callback").loaded()
    if kinds and Callback.__bases__ != kinds:
        Callback.__bases__ = kinds
