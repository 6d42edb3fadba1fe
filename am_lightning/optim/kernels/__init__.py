"""Both passes of a step, in several forms; ``registry`` has the table of them, ``plan`` chooses and keeps the choice.

Pass 1 reads and returns N and D of every row; pass 2 writes. All kernels give the same result up to rounding.
"""
