"""Training: any network on data of its kind, what is shown and kept while it runs, and where its time went.

``prepare(recipe("lenet"))`` is a :class:`Trainer`; its ``run()`` takes the steps. ``dlkernels train`` is the same with
checkpoints and logs (:mod:`.checkpoint`, :mod:`.logs`), a display (:mod:`.show`) and several processes
(:mod:`.distributed`).
"""

from .checkpoint import CheckpointError
from .loop import Trainer
from .operations import OperationTime, operation_times
from .optimizers import OPTIMIZERS, SCHEDULES
from .recipes import BACKENDS, Recipe, prepare, recipe, some_steps, task_for
from .settings import Progress, Settings, TrainingError
from .tasks import Task

__all__ = [
    "BACKENDS",
    "OPTIMIZERS",
    "SCHEDULES",
    "CheckpointError",
    "OperationTime",
    "Progress",
    "Recipe",
    "Settings",
    "Task",
    "Trainer",
    "TrainingError",
    "operation_times",
    "prepare",
    "recipe",
    "some_steps",
    "task_for",
]
