"""The two passes in six forms, of which ``passes`` chooses.

With torch's operators: ``reference`` (plain), ``blocked`` (CPU), ``foreach`` (accelerators). Fused, for ``fused=True``:
``triton_pair`` (CUDA, ROCm), ``cpu_loop`` (C++ on the CPU), ``compiled`` (torch.compile, elsewhere).

Pass 1 reads and returns N and D of every row; pass 2 writes. All give the same result up to rounding.
"""

from am_lightning.optim.kernels.passes import Passes
from am_lightning.optim.kernels.pieces import Numbers, Options, Piece

__all__ = ["Numbers", "Options", "Passes", "Piece"]
