"""Image captioning: a convolutional encoder, and a decoder that writes the caption word by word.

- :class:`Captioner` without attention: Vinyals et al. 2015, *Show and tell: a neural image caption generator*; as in
  the course, the image's features make the LSTM's first state rather than its first input.
- :class:`Captioner` with spatial attention: Xu et al. 2015, *Show, attend and tell*, sections 3.1 and 4.2
  (soft attention; the first state from the mean of the features).
- :class:`CaptioningTransformer`: a Transformer decoder (Vaswani et al. 2017) attends to the grid of features, as in
  Cornia et al. 2020, *Meshed-memory Transformer for image captioning*, without its memory and mesh.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import nn
from .language import shifted, token_loss
from .registry import register
from .rnn import RecurrentDecoder, RecurrentState
from .transformer import TokenEmbedding, TransformerDecoder, TransformerDecoderLayer, TransformerState


class ConvEncoder(torch.nn.Module):
    """Three 3x3 convolutions with batch norm and ReLU, the last two with stride 2: images ``[N, in_channels, H, W]`` to
    features ``[N, channels, ceil(H/4), ceil(W/4)]``.
    """

    def __init__(self, channels: int, in_channels: int, layers: ModuleType) -> None:
        super().__init__()
        widths = (in_channels, channels // 4, channels // 2, channels)
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.convs = torch.nn.ModuleList(
            layers.Conv2d(narrow, wide, kernel_size=3, stride=1 if index == 0 else 2, padding=1, bias=False)
            for index, (narrow, wide) in enumerate(pairs)
        )
        self.norms = torch.nn.ModuleList(layers.BatchNorm2d(wide) for wide in widths[1:])
        self.relus = torch.nn.ModuleList(torch.nn.ReLU() for _ in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm, relu in zip(self.convs, self.norms, self.relus, strict=True):
            x = nn.norm_activation(norm, relu, conv(x))
        return x


@register
class Captioner(torch.nn.Module):
    """LSTM that begins with an image's features, and with ``attention`` looks at them again before each word.

    Args:
        vocabulary_size: number of different tokens.
        encoder: any module from images ``[N, C, H, W]`` to features ``[N, encoder_channels, h, w]``; by default a small
            convolutional network for colour images.
        encoder_channels: how many channels the encoder gives.
        embedding_size: features that a token is embedded in.
        hidden_size: features of the state.
        attention: spatial attention to the features, as in *Show, attend and tell*.
        dropout: after the embedding and before the output.
        padding_index, start_index, end_index: the special symbols. Captions begin with the start symbol, end with the
            end symbol and are padded after it.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.
    """

    max_length = None

    def __init__(
        self,
        vocabulary_size: int,
        encoder: torch.nn.Module | None = None,
        encoder_channels: int = 128,
        embedding_size: int = 128,
        hidden_size: int = 256,
        attention: bool = False,
        dropout: float = 0.0,
        padding_index: int = 0,
        start_index: int = 1,
        end_index: int = 2,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        self.padding_index, self.start_index, self.end_index = padding_index, start_index, end_index
        self.encoder = ConvEncoder(encoder_channels, 3, layers) if encoder is None else encoder
        self.first_hidden = layers.Linear(encoder_channels, hidden_size)
        self.first_cell = layers.Linear(encoder_channels, hidden_size)
        self.decoder = RecurrentDecoder(
            vocabulary_size,
            embedding_size,
            hidden_size,
            1,
            dropout,
            padding_index,
            "additive" if attention else None,
            encoder_channels,
            layers,
        )

    def forward(self, images: Tensor, inputs: Tensor) -> Tensor:
        """Logits ``[N, T, vocabulary_size]`` of what follows the inputs ``[N, T]``, given images ``[N, C, H, W]``."""
        return self.decoder.logits(inputs, self.start(images))

    def loss(self, images: Tensor, captions: Tensor) -> Tensor:
        """Mean cross-entropy of the captions ``[N, T]`` but their start symbols and padding."""
        return self.decoder.loss(captions, self.start(images), self.padding_index)

    def start(self, images: Tensor) -> RecurrentState:
        """The decoder's state before its first token, given the images ``[N, C, H, W]`` (of :mod:`.decoding`)."""
        memory = self.encoder(images).flatten(2).transpose(1, 2)  # [N, h * w, encoder_channels]
        mean = memory.mean(1)  # [N, encoder_channels]
        hidden, cell = torch.tanh(self.first_hidden(mean)), torch.tanh(self.first_cell(mean))
        return self.decoder.start(hidden.unsqueeze(0), cell.unsqueeze(0), memory)

    def step(self, tokens: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """Logits ``[N, vocabulary_size]`` of what follows the next tokens ``[N, T]`` (of :mod:`.decoding`)."""
        hidden, state = self.decoder(tokens, state)
        return self.decoder.output(hidden[:, -1]), state

    def reorder(self, state: RecurrentState, rows: Tensor) -> RecurrentState:
        """The state of the sequences ``rows`` ``[M]``, in that order (of :mod:`.decoding`)."""
        return state.reorder(rows)


@register
class CaptioningTransformer(torch.nn.Module):
    """Transformer decoder that attends to the grid of an image's features.

    Args:
        vocabulary_size, encoder, encoder_channels, padding_index, start_index, end_index, layers: as for
            :class:`Captioner`.
        d_model, nhead, dim_feedforward, dropout, activation, norm_first: of the layers, see
            :class:`.transformer.TransformerEncoderLayer`.
        num_layers: of the decoder.

    Raises:
        ValueError: ``activation`` is unknown, or ``nhead`` does not divide ``d_model``.
    """

    max_length = None

    def __init__(
        self,
        vocabulary_size: int,
        encoder: torch.nn.Module | None = None,
        encoder_channels: int = 128,
        d_model: int = 256,
        nhead: int = 8,
        num_layers: int = 3,
        dim_feedforward: int = 1024,
        dropout: float = 0.1,
        activation: str = "relu",
        norm_first: bool = True,
        padding_index: int = 0,
        start_index: int = 1,
        end_index: int = 2,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        self.padding_index, self.start_index, self.end_index = padding_index, start_index, end_index
        self.encoder = ConvEncoder(encoder_channels, 3, layers) if encoder is None else encoder
        self.projection = layers.Linear(encoder_channels, d_model)
        self.grid_positions = nn.SinusoidalPositions()
        self.embedding = TokenEmbedding(vocabulary_size, d_model, dropout, padding_index, nn.SinusoidalPositions())
        layer = (d_model, nhead, dim_feedforward, dropout, activation, norm_first, layers)
        self.decoder = TransformerDecoder([TransformerDecoderLayer(*layer) for _ in range(num_layers)], d_model)
        self.output = layers.Linear(d_model, vocabulary_size)

    def forward(self, images: Tensor, inputs: Tensor) -> Tensor:
        """Logits ``[N, T, vocabulary_size]`` of what follows the inputs ``[N, T]``, given images ``[N, C, H, W]``."""
        return self.output(self._hidden(images, inputs))

    def loss(self, images: Tensor, captions: Tensor) -> Tensor:
        """Mean cross-entropy of the captions ``[N, T]`` but their start symbols and padding."""
        inputs, targets = shifted(captions)
        return token_loss(self._hidden(images, inputs), self.output, targets, self.padding_index)

    def start(self, images: Tensor) -> TransformerState:
        """The decoder's state before its first token, given the images ``[N, C, H, W]`` (of :mod:`.decoding`)."""
        return self.decoder.start(self._encode(images))

    def step(self, tokens: Tensor, state: TransformerState) -> tuple[Tensor, TransformerState]:
        """Logits ``[N, vocabulary_size]`` of what follows the next tokens ``[N, T]`` (of :mod:`.decoding`)."""
        hidden, state = self.decoder.step(self.embedding(tokens, state.length), state)
        return self.output(hidden[:, -1]), state

    def reorder(self, state: TransformerState, rows: Tensor) -> TransformerState:
        """The state of the sequences ``rows`` ``[M]``, in that order (of :mod:`.decoding`)."""
        return state.reorder(rows)

    def _encode(self, images: Tensor) -> Tensor:
        grid = self.encoder(images).flatten(2).transpose(1, 2)  # [N, h * w, encoder_channels], row by row
        return self.grid_positions(self.projection(grid))  # [N, h * w, d_model]

    def _hidden(self, images: Tensor, inputs: Tensor) -> Tensor:
        return self.decoder.causal(self.embedding(inputs), self._encode(images))  # [N, T, d_model]
