"""Networks of a deep-learning course, thin over :mod:`dlkernels.nn`, a file for each family.

Every builder takes ``layers``: the module that layers with parameters come from, ``dlkernels.nn`` (the default) or
``torch.nn``. Names of parameters, their initial values and the results are the same.
"""

from .lenet import LeNet
from .registry import get_model, get_model_builder, list_models, load_weights

__all__ = ["LeNet", "get_model", "get_model_builder", "list_models", "load_weights"]
