"""The kernels that run the two passes of a step. ``registry`` lists them, and ``plan`` chooses among them.

Pass 1 reads the tensors and returns N and D of every row, and pass 2 writes the tensors. All kernels give the same
result up to rounding.
"""
