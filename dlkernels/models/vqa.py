"""Visual question answering: an image and a question to one of a fixed set of answers.

Image and question are fused by the product of their projections (Antol et al. 2015, *VQA: visual question answering*,
section 4). With spatial attention the question first weights the places of the image (as in Yang et al. 2016, *Stacked
attention networks for image question answering*, with one layer of attention).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import nn
from .captioning import ConvEncoder
from .registry import register
from .rnn import AdditiveAttention, RecurrentEncoder


@register
class VQA(torch.nn.Module):
    """Images ``[N, C, H, W]`` and questions ``[N, T]`` to logits ``[N, num_answers]``.

    Args:
        vocabulary_size: number of different tokens of the questions.
        num_answers: number of different answers.
        encoder: any module from images to features ``[N, encoder_channels, h, w]``; by default a small convolutional
            network for colour images.
        encoder_channels: how many channels the encoder gives.
        embedding_size: features that a token is embedded in.
        hidden_size: features of the LSTM's state and of the fused representation.
        num_layers: of the LSTM.
        attention: the question weights the places of the image, which otherwise count alike.
        dropout: after the embedding, between the LSTM's layers, and of the fused representation.
        padding_index: what questions are padded with at their end.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_answers: int,
        encoder: torch.nn.Module | None = None,
        encoder_channels: int = 128,
        embedding_size: int = 128,
        hidden_size: int = 256,
        num_layers: int = 1,
        attention: bool = False,
        dropout: float = 0.0,
        padding_index: int = 0,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        self.image_encoder = ConvEncoder(encoder_channels, 3, layers) if encoder is None else encoder
        self.question_encoder = RecurrentEncoder(
            vocabulary_size, embedding_size, hidden_size, num_layers, dropout, padding_index, layers
        )
        self.attend = AdditiveAttention(hidden_size, encoder_channels, hidden_size, layers) if attention else None
        self.image_projection = layers.Linear(encoder_channels, hidden_size)
        self.question_projection = layers.Linear(hidden_size, hidden_size)
        self.classifier = torch.nn.Sequential(
            torch.nn.Dropout(dropout),
            layers.Linear(hidden_size, hidden_size),
            torch.nn.ReLU(),
            layers.Linear(hidden_size, num_answers),
        )
        self.cross_entropy = layers.CrossEntropyLoss()

    def forward(self, images: Tensor, questions: Tensor) -> Tensor:
        """Logits ``[N, num_answers]``.

        Raises:
            ValueError: a question is empty or goes on after padding.
        """
        _, (hidden, _) = self.question_encoder(questions)
        question = hidden[-1]  # [N, hidden_size]
        places = self.image_encoder(images).flatten(2).transpose(1, 2)  # [N, h * w, encoder_channels]
        if self.attend is None:
            image = places.mean(1)  # [N, encoder_channels]
        else:
            image, _ = self.attend(question, self.attend.key(places), places, None)
        fused = torch.tanh(self.image_projection(image)) * torch.tanh(self.question_projection(question))
        return self.classifier(fused)

    def loss(self, images: Tensor, questions: Tensor, answers: Tensor) -> Tensor:
        """Mean cross-entropy of the answers ``[N]``."""
        return self.cross_entropy(self(images, questions), answers)
