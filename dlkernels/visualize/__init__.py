"""Seeing inside: what a classifier looks for, where it looks, and how it is fooled; a file for each subject.

Functions take any ``torch.nn.Module`` that turns images ``[N, C, H, W]`` into logits ``[N, classes]``, and return
tensors. They look at it in evaluation mode, and leave its mode, gradients and hooks as they were. Of what a function
returned, the ``draw_*`` function beside it makes a matplotlib figure, and :func:`save` writes that as PNG::

    gradients = visualize.saliency(model, images, classes)  # [N, C, H, W]
    visualize.save(visualize.draw_saliency(images, gradients, classes), "saliency.png")

captum (occlusion, saliency), scikit-learn (embeddings, neighbours) and matplotlib are needed only by the functions that
use them; the extra ``course`` has all three.
"""

from .activations import activation_maps, draw_activation_maps
from .adversarial import (
    TargetedAttack,
    accuracy_under_attack,
    draw_accuracy_under_attack,
    draw_attack,
    fgsm,
    random_noise,
    targeted_attack,
)
from .class_images import class_images, draw_class_images
from .embeddings import draw_embedding, pca, tsne
from .features import last_features
from .figures import save
from .filters import draw_filters, first_layer_filters
from .guided_backprop import draw_guided_backprop, guided_backprop
from .neighbours import draw_neighbours, nearest_neighbours
from .occlusion import draw_occlusion, occlusion
from .patches import MaximalPatches, draw_maximal_patches, maximal_patches, receptive_fields
from .saliency import draw_saliency, saliency
from .shapley import draw_shapley_values, shapley_values

__all__ = [
    "MaximalPatches",
    "TargetedAttack",
    "accuracy_under_attack",
    "activation_maps",
    "class_images",
    "draw_accuracy_under_attack",
    "draw_activation_maps",
    "draw_attack",
    "draw_class_images",
    "draw_embedding",
    "draw_filters",
    "draw_guided_backprop",
    "draw_maximal_patches",
    "draw_neighbours",
    "draw_occlusion",
    "draw_saliency",
    "draw_shapley_values",
    "fgsm",
    "first_layer_filters",
    "guided_backprop",
    "last_features",
    "maximal_patches",
    "nearest_neighbours",
    "occlusion",
    "pca",
    "random_noise",
    "receptive_fields",
    "save",
    "saliency",
    "shapley_values",
    "targeted_attack",
    "tsne",
]
