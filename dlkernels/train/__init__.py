"""Training: a loop over mini-batches, what it shows while it runs, and where its time went."""

from .loop import Progress, Settings, TrainingError, evaluate, train
from .operations import OperationTime, operation_times
from .recipes import BACKENDS, lenet_on_digits, some_steps

__all__ = [
    "BACKENDS",
    "OperationTime",
    "Progress",
    "Settings",
    "TrainingError",
    "evaluate",
    "lenet_on_digits",
    "operation_times",
    "some_steps",
    "train",
]
