"""Contrastive learning: features of what belongs together are to be told from all others by their dot product.

- InfoNCE and CPC: van den Oord, Li & Vinyals 2018, *Representation learning with contrastive predictive coding*.
- NT-Xent and SimCLR: Chen et al. 2020, *A simple framework for contrastive learning of visual representations*.
- MoCo v1: He et al. 2020, *Momentum contrast for unsupervised visual representation learning*; v2: Chen, Fan, Girshick
  & He 2020, *Improved baselines with momentum contrastive learning*.
- CLIP: Radford et al. 2021, *Learning transferable visual models from natural language supervision*.

Under ``torchrun`` every process contrasts its rows with those of all (:mod:`.distributed`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .. import functional as F
from .. import nn
from ..models.transformer import TransformerEncoder, TransformerEncoderLayer
from . import distributed
from .augment import Augmentation
from .momentum import check_momentum, follow, follower


def check_temperature(temperature: float) -> None:
    """Raises a ValueError unless ``temperature`` is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def info_nce(queries: Tensor, keys: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Mean over i of ``-log(exp(q_i . k_i / temperature) / sum_j exp(q_i . k_j / temperature))``.

    The dot products of all pairs are never in memory. A loss of log N is that of queries which know nothing.

    Args:
        queries: ``[N, D]``.
        keys: ``[N, D]``, the one of each query in its row; the others are what it is to be told from.
        temperature: divides the dot products.

    Raises:
        ValueError: the shapes differ, there is nothing to tell a key from, or ``temperature`` is not positive.
    """
    if not isinstance(temperature, Tensor):
        check_temperature(temperature)
    if queries.dim() != 2 or queries.shape != keys.shape:
        raise ValueError(f"queries and keys must both be [N, D], got {list(queries.shape)} and {list(keys.shape)}")
    every = distributed.gathered(keys)  # [M, D], M of all processes
    if len(every) < 2:
        raise ValueError(f"contrasting needs at least two rows, got {len(every)}")
    own = distributed.own_rows(len(queries), queries.device)
    return F.linear_cross_entropy(queries / temperature, every, own)


def nt_xent(first: Tensor, second: Tensor, temperature: float = 0.5) -> Tensor:
    """The normalised, temperature-scaled cross-entropy of SimCLR: each of 2N views is to find the other view of its
    image among the 2N - 1 others, by cosine similarity.

    Args:
        first, second: ``[N, D]``, of two views of the same images; they are normalised here.
        temperature: divides the similarities.

    Raises:
        ValueError: the shapes differ, there is one image alone, or ``temperature`` is not positive.
    """
    check_temperature(temperature)
    if first.dim() != 2 or first.shape != second.shape:
        raise ValueError(f"first and second must both be [N, D], got {list(first.shape)} and {list(second.shape)}")
    first, second = normalize(first, dim=1), normalize(second, dim=1)
    others = torch.cat([distributed.gathered(first), distributed.gathered(second)])  # [2M, D], M of all processes
    if len(others) < 4:
        raise ValueError("contrasting needs at least two images, got 1")
    own = distributed.own_rows(len(first), first.device)
    own_second = own + len(others) // 2
    logits = F.linear(torch.cat([first, second]) / temperature, others)  # [2N, 2M]
    with torch.no_grad():  # exp(-inf) is 0, and so is its gradient: the one block of logits is not copied
        logits[torch.arange(len(logits), device=own.device), torch.cat([own, own_second])] = -math.inf
    return F.cross_entropy(logits, torch.cat([own_second, own]))


def projection_head(features: int, hidden_features: int, out_features: int) -> torch.nn.Sequential:
    """Linear, ReLU, linear: what is contrasted; the features before it are kept for other tasks."""
    return nn.Sequential(
        nn.Linear(features, hidden_features), torch.nn.ReLU(), nn.Linear(hidden_features, out_features)
    )


class SimCLR(torch.nn.Module):
    """Two views of each image, one encoder, a projection, :func:`nt_xent`.

    Args:
        encoder: any module from images to ``[N, features]``.
        features: how many features the encoder gives.
        augment: makes random views of images, as :func:`.augment.random_view` does.
        projection_features: size of what is contrasted.
        temperature: divides the similarities.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    def __init__(
        self,
        encoder: torch.nn.Module,
        features: int,
        augment: Augmentation,
        projection_features: int = 128,
        temperature: float = 0.5,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        self.encoder = encoder
        self.projection = projection_head(features, features, projection_features)
        self.augment = augment
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        """Images to projections ``[N, projection_features]``."""
        return self.projection(self.encoder(images))

    def loss(self, images: Tensor) -> Tensor:
        """:func:`nt_xent` of two views of ``images``, which need no labels.

        Raises:
            ValueError: there is one image alone.
        """
        views = torch.cat([self.augment(images), self.augment(images)])  # one batch: shared statistics of batch norm
        first, second = self(views).chunk(2)
        return nt_xent(first, second, self.temperature)


class MoCo(torch.nn.Module):
    """Momentum contrast: a query is to find the key of the same image among those of many batches before.

    Keys come from an encoder that follows the queries' slowly, so that those in the queue stay comparable.
    :func:`moco_v1` and :func:`moco_v2` build the two versions.

    Args:
        encoder: any module from images to ``[N, features]``.
        head: from these to what is contrasted, ``[N, projection_features]``.
        augment: makes random views of images, as :func:`.augment.random_view` does.
        projection_features: size of a key.
        queue_size: how many keys are kept.
        momentum: share of the key encoder that stays in an :meth:`update`.
        temperature: divides the similarities.

    Attributes:
        queue: the keys ``[queue_size, projection_features]``, at first random ones.
        oldest: the row of the queue that is replaced next.

    Raises:
        ValueError: ``queue_size`` or ``temperature`` is not positive, or ``momentum`` is outside [0, 1].
    """

    queue: Tensor
    oldest: Tensor

    def __init__(
        self,
        encoder: torch.nn.Module,
        head: torch.nn.Module,
        augment: Augmentation,
        projection_features: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_momentum(momentum)
        if queue_size < 1:
            raise ValueError(f"queue_size must be positive, got {queue_size}")
        self.encoder, self.head = encoder, head
        self.key_encoder, self.key_head = follower(encoder), follower(head)
        self.augment = augment
        self.momentum, self.temperature = momentum, temperature
        self.register_buffer("queue", normalize(torch.randn(queue_size, projection_features), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))
        self._waiting: list[Tensor] = []  # keys since the last update

    def forward(self, images: Tensor) -> Tensor:
        """Images to queries ``[N, projection_features]`` of length 1."""
        return normalize(self.head(self.encoder(images)), dim=1)

    def keys(self, images: Tensor) -> Tensor:
        """Images to keys ``[N, projection_features]`` of length 1, without gradient.

        Under ``torchrun`` each process computes the keys of images of all (:func:`.distributed.shuffled`).
        """
        return distributed.shuffled(lambda x: normalize(self.key_head(self.key_encoder(x)), dim=1), images)

    def loss(self, images: Tensor) -> Tensor:
        """Mean cross-entropy of each query's own key against the queue; log(1 + queue_size) where all are alike.

        While training, the keys wait for :meth:`update` to put them into the queue.
        """
        queries, keys = self(self.augment(images)), self.keys(self.augment(images))
        if self.training:
            self._waiting.append(keys)
        scaled = queries / self.temperature
        own = (scaled * keys).sum(1)  # [N]
        # The sum over the queue, whose logits are never in memory, from the loss of its first key: log sum - logit.
        first_key = self.queue.new_zeros(len(queries), dtype=torch.int64)
        others = F.linear_cross_entropy(scaled, self.queue, first_key, reduction="none") + scaled @ self.queue[0]
        return F.cross_entropy(torch.stack([own, others], 1), first_key)

    @torch.no_grad()
    def update(self) -> None:
        """To be called after each step of the optimiser: the key encoder follows, and the last keys enter the queue,
        from which as many of the oldest leave."""
        follow(self.key_encoder, self.encoder, self.momentum)
        follow(self.key_head, self.head, self.momentum)
        for keys in self._waiting:
            self._enqueue(distributed.gathered(keys))
        self._waiting.clear()

    def _enqueue(self, keys: Tensor) -> None:
        size = len(self.queue)
        rows = (self.oldest + torch.arange(len(keys), device=keys.device)) % size
        self.queue[rows[-size:]] = keys[-size:]
        self.oldest.copy_((self.oldest + len(keys)) % size)


def moco_v1(
    encoder: torch.nn.Module,
    features: int,
    augment: Augmentation,
    projection_features: int = 128,
    queue_size: int = 65536,
    momentum: float = 0.999,
    temperature: float = 0.07,
) -> MoCo:
    """MoCo with a linear head; arguments as those of :class:`MoCo`, and ``features``, how many the encoder gives."""
    head = nn.Linear(features, projection_features)
    return MoCo(encoder, head, augment, projection_features, queue_size, momentum, temperature)


def moco_v2(
    encoder: torch.nn.Module,
    features: int,
    augment: Augmentation,
    projection_features: int = 128,
    queue_size: int = 65536,
    momentum: float = 0.999,
    temperature: float = 0.2,
) -> MoCo:
    """MoCo with SimCLR's head of two layers and a higher temperature; arguments as those of :func:`moco_v1`."""
    head = projection_head(features, features, projection_features)
    return MoCo(encoder, head, augment, projection_features, queue_size, momentum, temperature)


class CPC(torch.nn.Module):
    """Contrastive predictive coding: the context of a sequence so far is to tell what follows in 1 to ``steps`` places
    from what follows elsewhere, in the batch and in the sequence.

    Args:
        encoder: any module from parts of sequences ``[M, ...]`` to ``[M, features]``.
        features: how many features the encoder gives.
        context_features: size of the context, an LSTM's state.
        steps: how far ahead is predicted.

    Raises:
        ValueError: ``steps`` is not positive.
    """

    def __init__(self, encoder: torch.nn.Module, features: int, context_features: int = 256, steps: int = 4) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps must be positive, got {steps}")
        self.encoder = encoder
        self.context = nn.LSTM(features, context_features, batch_first=True)
        self.predictions = torch.nn.ModuleList(nn.Linear(context_features, features, bias=False) for _ in range(steps))

    def forward(self, sequences: Tensor) -> Tensor:
        """Sequences ``[N, T, ...]`` to the context after each part, ``[N, T, context_features]``."""
        return self.context(self._encode(sequences))[0]

    def loss(self, sequences: Tensor) -> Tensor:
        """Mean over the steps of :func:`info_nce` between what is predicted and what follows.

        Raises:
            ValueError: the sequences ``[N, T, ...]`` have no more than ``steps`` parts.
        """
        if sequences.shape[1] <= len(self.predictions):
            expected = f"more than {len(self.predictions)} parts, as many as steps"
            raise ValueError(f"sequences must have {expected}, got {sequences.shape[1]}")
        encoded = self._encode(sequences)  # [N, T, features]
        context, _ = self.context(encoded)  # [N, T, context_features]
        losses = [
            info_nce(predict(context[:, :-step]).flatten(0, 1), encoded[:, step:].flatten(0, 1))
            for step, predict in enumerate(self.predictions, 1)
        ]
        return torch.stack(losses).mean()

    def _encode(self, sequences: Tensor) -> Tensor:
        return self.encoder(sequences.flatten(0, 1)).unflatten(0, sequences.shape[:2])


class TextEncoder(torch.nn.Module):
    """CLIP's encoder of texts: tokens ``[N, T]`` to ``[N, d_model]``, the features of the end symbol.

    A pre-norm Transformer in which each token sees itself and those before.

    Args:
        vocabulary_size: number of different tokens.
        max_length: most tokens of a text.
        d_model, nhead, num_layers: of the Transformer.
        end_index: the end symbol, which every text has; what follows it is padding.

    Raises:
        ValueError: ``nhead`` does not divide ``d_model``.
    """

    def __init__(
        self,
        vocabulary_size: int,
        max_length: int = 77,
        d_model: int = 512,
        nhead: int = 8,
        num_layers: int = 12,
        end_index: int = 2,
    ) -> None:
        super().__init__()
        self.end_index = end_index
        self.embedding = torch.nn.Embedding(vocabulary_size, d_model)
        self.positions = nn.LearnedPositions(max_length, d_model)
        torch.nn.init.normal_(self.embedding.weight, std=0.02)
        layers = [
            TransformerEncoderLayer(d_model, nhead, 4 * d_model, 0.0, "gelu", norm_first=True)
            for _ in range(num_layers)
        ]
        self.encoder = TransformerEncoder(layers, d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[N, T]`` to features ``[N, d_model]``.

        Raises:
            ValueError: a text has no end symbol, or more than ``max_length`` tokens.
        """
        is_end = tokens == self.end_index
        if not is_end.any(1).all():
            raise ValueError(f"every text must have the end symbol, {self.end_index}; one has not")
        length = tokens.shape[1]
        hidden_from = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        x = self.positions(self.embedding(tokens))  # [N, T, d_model]
        x = self.encoder(x, hidden_from, is_causal=True)
        return x[torch.arange(len(x), device=x.device), is_end.int().argmax(1)]


class CLIP(torch.nn.Module):
    """Images and their texts, close to each other in one space of features.

    Args:
        image_encoder: any module from images to ``[N, image_features]``.
        image_features: how many features it gives.
        text_encoder: any module from texts to ``[N, text_features]``, for instance a :class:`TextEncoder`.
        text_features: how many features it gives.
        features: size of the common space.
    """

    GREATEST_SCALE = 100.0

    def __init__(
        self,
        image_encoder: torch.nn.Module,
        image_features: int,
        text_encoder: torch.nn.Module,
        text_features: int,
        features: int = 512,
    ) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.image_projection = nn.Linear(image_features, features, bias=False)
        self.text_projection = nn.Linear(text_features, features, bias=False)
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # of one over the temperature

    def encode_images(self, images: Tensor) -> Tensor:
        """Images to points ``[N, features]`` on the unit sphere."""
        return normalize(self.image_projection(self.image_encoder(images)), dim=1)

    def encode_texts(self, texts: Tensor) -> Tensor:
        """Texts to points ``[N, features]`` on the unit sphere."""
        return normalize(self.text_projection(self.text_encoder(texts)), dim=1)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Logits ``[N, M]`` of each of M texts for each of N images: a classifier, if the texts describe classes."""
        return self.log_scale.exp() * F.linear(self.encode_images(images), self.encode_texts(texts))

    def loss(self, images: Tensor, texts: Tensor) -> Tensor:
        """Mean of :func:`info_nce` from images ``[N, C, H, W]`` to their texts ``[N, T]``, and from texts to images.

        Raises:
            ValueError: there are not as many texts as images, or one of each alone.
        """
        images, texts = self.encode_images(images), self.encode_texts(texts)
        temperature = (-self.log_scale).exp()
        return (info_nce(images, texts, temperature) + info_nce(texts, images, temperature)) / 2

    @torch.no_grad()
    def update(self) -> None:
        """To be called after each step of the optimiser: the learnt scale is kept from passing 100 (section 2.5)."""
        self.log_scale.clamp_(max=math.log(self.GREATEST_SCALE))
