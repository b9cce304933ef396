"""Learning without labels: pretext tasks, colour, contrastive learning, self-distillation; and what features are worth.

Each method is a module with ``loss(*batch)``; where a step has more to it than the optimiser's, ``update()`` is called
after that. Encoders are any modules from images to features, such as networks of :mod:`dlkernels.models` without their
last layer. Every softmax loss is computed by :mod:`dlkernels.functional`, without more than one block of logits.
"""

from .augment import random_view
from .color import (
    Bins,
    Colorization,
    SplitBrainAutoencoder,
    VideoColorization,
    color_bins,
    color_prior,
    gamut,
    lab_to_rgb,
    rebalancing,
    rgb_to_lab,
)
from .contrastive import CLIP, CPC, MoCo, SimCLR, TextEncoder, info_nce, moco_v1, moco_v2, nt_xent
from .dino import DINO, DINOHead
from .evaluate import features_of, linear_probe, weighted_knn
from .pretext import Inpainting, Jigsaw, RelativePatchLocation, RotationPrediction, distant_permutations

__all__ = [
    "Bins",
    "CLIP",
    "CPC",
    "Colorization",
    "DINO",
    "DINOHead",
    "Inpainting",
    "Jigsaw",
    "MoCo",
    "RelativePatchLocation",
    "RotationPrediction",
    "SimCLR",
    "SplitBrainAutoencoder",
    "TextEncoder",
    "VideoColorization",
    "color_bins",
    "color_prior",
    "distant_permutations",
    "features_of",
    "gamut",
    "info_nce",
    "lab_to_rgb",
    "linear_probe",
    "moco_v1",
    "moco_v2",
    "nt_xent",
    "random_view",
    "rebalancing",
    "rgb_to_lab",
    "weighted_knn",
]
