"""Triton's kernels, for CUDA and ROCm."""
