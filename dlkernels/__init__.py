"""Hand-written CPU and CUDA kernels for PyTorch."""
