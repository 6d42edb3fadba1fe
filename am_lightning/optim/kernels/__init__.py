"""The two passes in six forms, of which ``passes`` chooses.

With torch's operators: ``reference`` (plain), ``blocked`` (CPU), ``foreach`` (accelerators). Fused: ``triton_pair`` (by
default on CUDA and ROCm), for ``fused=True`` ``cpu_loop`` (C++ on the CPU) and ``compiled`` (torch.compile, elsewhere).

Pass 1 reads and returns N and D of every row; pass 2 writes. All give the same result up to rounding.
"""

from am_lightning.optim.kernels.inputs import Numbers, Options, Piece
from am_lightning.optim.kernels.plan import Passes

__all__ = ["Numbers", "Options", "Passes", "Piece"]
