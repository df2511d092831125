"""The CPU: kernels in C, attention over contiguous slots, threads."""
