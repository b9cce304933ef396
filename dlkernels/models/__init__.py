"""Networks of a deep-learning course, thin over :mod:`dlkernels.nn`, a file for each family.

Every builder takes ``layers``: the module that layers with parameters come from, ``dlkernels.nn`` (the default) or
``torch.nn``. Names of parameters, their initial values and the results are the same.
"""

from .autoencoder import Autoencoder
from .convnet import ThreeLayerConvNet
from .gan import GAN
from .lenet import LeNet, LeNet5
from .linear import LinearClassifier
from .mlp import MLP, TwoLayerNet
from .mlp_mixer import MLPMixer, mixer_b_16, mixer_l_16, mixer_s_16
from .nas import CellNetwork
from .registry import get_model, get_model_builder, list_models, load_weights
from .vision_transformer import VisionTransformer, vit_b_16, vit_b_32, vit_h_14, vit_l_16, vit_l_32

__all__ = [
    "GAN",
    "MLP",
    "Autoencoder",
    "CellNetwork",
    "LeNet",
    "LeNet5",
    "LinearClassifier",
    "MLPMixer",
    "ThreeLayerConvNet",
    "TwoLayerNet",
    "VisionTransformer",
    "get_model",
    "get_model_builder",
    "list_models",
    "load_weights",
    "mixer_b_16",
    "mixer_l_16",
    "mixer_s_16",
    "vit_b_16",
    "vit_b_32",
    "vit_h_14",
    "vit_l_16",
    "vit_l_32",
]
