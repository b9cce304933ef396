"""Networks of a deep-learning course, thin over :mod:`dlkernels.nn`, a file for each family.

Every builder takes ``layers``: the module that layers with parameters come from, ``dlkernels.nn`` (the default) or
``torch.nn``. Names of parameters, their initial values and the results are the same.
"""

from . import decoding
from .captioning import Captioner, CaptioningTransformer
from .gpt import GPT, gpt2_small
from .lenet import LeNet
from .registry import get_model, get_model_builder, list_models, load_weights
from .rnn import CharLM, Seq2Seq
from .transformer import Transformer
from .vqa import VQA

__all__ = [
    "GPT",
    "VQA",
    "Captioner",
    "CaptioningTransformer",
    "CharLM",
    "LeNet",
    "Seq2Seq",
    "Transformer",
    "decoding",
    "get_model",
    "get_model_builder",
    "gpt2_small",
    "list_models",
    "load_weights",
]
