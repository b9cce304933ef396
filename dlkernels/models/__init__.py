"""Networks of a deep-learning course, thin over :mod:`dlkernels.nn`."""

from .lenet import LeNet

__all__ = ["LeNet"]
