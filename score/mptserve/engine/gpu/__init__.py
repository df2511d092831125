"""NVIDIA GPUs: Triton kernels, CUDA graphs, the state of rows between steps."""
