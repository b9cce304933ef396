"""Networks of a deep-learning course, thin over :mod:`dlkernels.nn`, a file for each family.

Every builder takes ``layers``: the module that layers with parameters come from, ``dlkernels.nn`` (the default) or
``torch.nn``. Names of parameters, their initial values and the results are the same.
"""

from . import decoding
from .alexnet import alexnet
from .autoencoder import Autoencoder
from .captioning import Captioner, CaptioningTransformer
from .convnet import ThreeLayerConvNet
from .densenet import densenet121, densenet161, densenet169, densenet201
from .efficientnet import (
    efficientnet_b0,
    efficientnet_b1,
    efficientnet_b2,
    efficientnet_b3,
    efficientnet_b4,
    efficientnet_b5,
    efficientnet_b6,
    efficientnet_b7,
)
from .gan import GAN
from .googlenet import googlenet
from .gpt import GPT, gpt2_small
from .lenet import LeNet, LeNet5
from .linear import LinearClassifier
from .mlp import MLP, TwoLayerNet
from .mlp_mixer import MLPMixer, mixer_b_16, mixer_l_16, mixer_s_16
from .mnasnet import mnasnet0_5, mnasnet0_75, mnasnet1_0, mnasnet1_3
from .mobilenet import mobilenet_v1, mobilenet_v2
from .nas import CellNetwork
from .registry import get_model, get_model_builder, list_models, load_weights
from .resnet import (
    preact_resnet18,
    preact_resnet50,
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet44,
    resnet50,
    resnet56,
    resnet101,
    resnet110,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from .rnn import CharLM, Seq2Seq
from .transformer import Transformer
from .vgg import vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn
from .vision_transformer import VisionTransformer, vit_b_16, vit_b_32, vit_h_14, vit_l_16, vit_l_32
from .vqa import VQA

__all__ = [
    "GAN",
    "GPT",
    "MLP",
    "VQA",
    "Autoencoder",
    "Captioner",
    "CaptioningTransformer",
    "CellNetwork",
    "CharLM",
    "LeNet",
    "LeNet5",
    "LinearClassifier",
    "MLPMixer",
    "Seq2Seq",
    "ThreeLayerConvNet",
    "Transformer",
    "TwoLayerNet",
    "VisionTransformer",
    "alexnet",
    "decoding",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "get_model",
    "get_model_builder",
    "googlenet",
    "gpt2_small",
    "list_models",
    "load_weights",
    "mixer_b_16",
    "mixer_l_16",
    "mixer_s_16",
    "mnasnet0_5",
    "mnasnet0_75",
    "mnasnet1_0",
    "mnasnet1_3",
    "mobilenet_v1",
    "mobilenet_v2",
    "preact_resnet18",
    "preact_resnet50",
    "resnet101",
    "resnet110",
    "resnet152",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "resnext50_32x4d",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "vit_b_16",
    "vit_b_32",
    "vit_h_14",
    "vit_l_16",
    "vit_l_32",
    "wide_resnet101_2",
    "wide_resnet50_2",
]
