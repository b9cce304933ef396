"""One module per operation: its function, its fake (shape-only) kernels and its ``torch.autograd.Function``."""
