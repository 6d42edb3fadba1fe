"""Kernels for the CPU: chunks processed with the operators of torch, and a C++ loop."""
