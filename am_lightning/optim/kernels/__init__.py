"""The two passes, three times: ``reference`` (plain), ``blocked`` (CPU, eager) and ``foreach`` (accelerators, eager).

Pass 1 reads and returns N and D of every row; pass 2 writes. All give the same result up to rounding.
"""

from am_lightning.optim.kernels.passes import Passes
from am_lightning.optim.kernels.pieces import Numbers, Options, Piece

__all__ = ["Numbers", "Options", "Passes", "Piece"]
