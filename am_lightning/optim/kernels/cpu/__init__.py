"""The CPU's kernels: chunked with torch's operators, and one C++ loop."""
