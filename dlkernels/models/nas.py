"""Architectures found by search: networks of two kinds of cells, and the evolution that finds cells.

A network stacks copies of a normal cell, which keeps height and width, and of a reduction cell, which halves them and
doubles the channels (Zoph et al. 2018, section 3). A cell is a small graph: its first two nodes are the outputs of the
two cells before it, every other node is the sum of two operations on earlier nodes, and its output is the concatenation
of those sums. What a search chooses, the operations and the nodes that they are applied to, is a :class:`Genotype`.

The operations (all but a 5x5 dilated convolution) and the network around the cells are those of DARTS (Liu et al.
2019, section 3.1), whose published cells are the default. The search is regularised evolution (Real et al. 2019,
algorithm 1).
"""

from __future__ import annotations

import math
import random
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import nn
from .registry import register

# ---- Operations: [N, C, H, W] to [N, C, H/stride, W/stride] ----------------------------------------------------------


class ConvNorm(torch.nn.Module):
    """ReLU, 1x1 convolution, batch norm: changes the number of channels."""

    def __init__(self, in_channels: int, out_channels: int, layers: ModuleType) -> None:
        super().__init__()
        self.activation = torch.nn.ReLU()
        self.conv = layers.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = layers.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.activation(x)))


class FactorizedReduce(torch.nn.Module):
    """ReLU, two 1x1 convolutions of stride 2, the second one pixel to the right and below, side by side, batch norm."""

    def __init__(self, in_channels: int, out_channels: int, layers: ModuleType) -> None:
        super().__init__()
        self.activation = torch.nn.ReLU()
        self.conv1 = layers.Conv2d(in_channels, out_channels // 2, 1, stride=2, bias=False)
        self.conv2 = layers.Conv2d(in_channels, out_channels // 2, 1, stride=2, bias=False)
        self.norm = layers.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(x)
        return self.norm(torch.cat([self.conv1(x), self.conv2(F.pad(x, (-1, 1, -1, 1)))], 1))


class DepthwiseSeparable(torch.nn.Sequential):
    """A depthwise convolution that keeps height and width over its stride, then one across channels."""

    def __init__(self, channels: int, kernel_size: int, stride: int, dilation: int, layers: ModuleType) -> None:
        padding = dilation * (kernel_size // 2)
        super().__init__(
            layers.Conv2d(channels, channels, kernel_size, stride, padding, dilation, groups=channels, bias=False),
            layers.Conv2d(channels, channels, 1, bias=False),
        )


class SeparableConv(torch.nn.Module):
    """ReLU, depthwise-separable convolution, batch norm, all twice; the stride is the first one's."""

    def __init__(self, channels: int, kernel_size: int, stride: int, layers: ModuleType) -> None:
        super().__init__()
        self.activation1 = torch.nn.ReLU()
        self.conv1 = DepthwiseSeparable(channels, kernel_size, stride, 1, layers)
        self.norm1 = layers.BatchNorm2d(channels)
        self.activation2 = torch.nn.ReLU()
        self.conv2 = DepthwiseSeparable(channels, kernel_size, 1, 1, layers)
        self.norm2 = layers.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.activation1(x))
        x = nn.norm_activation(self.norm1, self.activation2, x)
        return self.norm2(self.conv2(x))


class DilatedConv(torch.nn.Module):
    """ReLU, depthwise-separable convolution of dilation 2, batch norm."""

    def __init__(self, channels: int, kernel_size: int, stride: int, layers: ModuleType) -> None:
        super().__init__()
        self.activation = torch.nn.ReLU()
        self.conv = DepthwiseSeparable(channels, kernel_size, stride, 2, layers)
        self.norm = layers.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.activation(x)))


def skip_connection(channels: int, stride: int, layers: ModuleType) -> torch.nn.Module:
    """The identity, as far as the stride allows."""
    return torch.nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, layers)


# Each is built from channels, stride and layers.
OPERATIONS: dict[str, Callable[[int, int, ModuleType], torch.nn.Module]] = {
    "sep_conv_3x3": lambda channels, stride, layers: SeparableConv(channels, 3, stride, layers),
    "sep_conv_5x5": lambda channels, stride, layers: SeparableConv(channels, 5, stride, layers),
    "dil_conv_3x3": lambda channels, stride, layers: DilatedConv(channels, 3, stride, layers),
    "max_pool_3x3": lambda channels, stride, layers: torch.nn.MaxPool2d(3, stride, padding=1),
    "avg_pool_3x3": lambda channels, stride, layers: torch.nn.AvgPool2d(3, stride, 1, count_include_pad=False),
    "skip_connect": skip_connection,
}


# ---- Genotype --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edge:
    """An operation applied to a node: 0 and 1 are the cells before the last and before this one, 2 the first sum."""

    operation: str
    source: int

    def __str__(self) -> str:
        return f"{self.operation}@{self.source}"


Cell = tuple[tuple[Edge, Edge], ...]  # the two summands of each node from 2 on


@dataclass(frozen=True)
class Genotype:
    """The two cells of a network. ``str`` writes it and :meth:`parse` reads it.

    Raises:
        ValueError: a cell has no node, an operation is unknown, or a node does not come before the one that takes it.
    """

    normal: Cell
    reduction: Cell

    def __post_init__(self) -> None:
        for name, cell in (("normal", self.normal), ("reduction", self.reduction)):
            if not cell:
                raise ValueError(f"the {name} cell has no node")
            for node, edges in enumerate(cell, start=2):
                for edge in edges:
                    if edge.operation not in OPERATIONS:
                        raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {edge.operation!r}")
                    if not 0 <= edge.source < node:
                        raise ValueError(
                            f"node {node} of the {name} cell must take one from 0 to {node - 1}, got {edge}"
                        )

    def __str__(self) -> str:
        normal, reduction = (
            ", ".join(f"{first} + {second}" for first, second in cell) for cell in (self.normal, self.reduction)
        )
        return f"normal: {normal}; reduction: {reduction}"

    @classmethod
    def parse(cls, text: str) -> Genotype:
        """What ``str`` has written.

        Raises:
            ValueError: ``text`` has another form, or its cells are refused by :class:`Genotype`.
        """
        cells = re.fullmatch(r"normal: (.+); reduction: (.+)", text)
        if cells is None:
            raise ValueError(f"a genotype reads 'normal: ...; reduction: ...', got {text!r}")
        return cls(*(tuple(map(_parse_node, cell.split(", "))) for cell in cells.groups()))


def _parse_node(text: str) -> tuple[Edge, Edge]:
    node = re.fullmatch(r"(\w+)@(\d+) \+ (\w+)@(\d+)", text)
    if node is None:
        raise ValueError(f"a node reads 'operation@source + operation@source', got {text!r}")
    return Edge(node[1], int(node[2])), Edge(node[3], int(node[4]))


# Found on CIFAR-10 by second-order DARTS (Liu et al. 2019, figures 4 and 5).
DARTS = Genotype.parse(
    "normal: sep_conv_3x3@0 + sep_conv_3x3@1, sep_conv_3x3@0 + sep_conv_3x3@1, sep_conv_3x3@1 + skip_connect@0, "
    "skip_connect@0 + dil_conv_3x3@2; reduction: max_pool_3x3@0 + max_pool_3x3@1, skip_connect@2 + max_pool_3x3@1, "
    "max_pool_3x3@0 + skip_connect@2, skip_connect@2 + max_pool_3x3@1"
)


# ---- Network ---------------------------------------------------------------------------------------------------------


class CellBlock(torch.nn.Module):
    """One cell: the outputs of the two before it to ``[N, nodes * channels, H, W]``."""

    def __init__(
        self,
        cell: Cell,
        in_channels: tuple[int, int],
        channels: int,
        stride: int,
        follows_reduction: bool,
        layers: ModuleType,
    ) -> None:
        super().__init__()
        # After a reduction the cell before the last has twice the height and width of the last one.
        first = FactorizedReduce if follows_reduction else ConvNorm
        self.preprocess0 = first(in_channels[0], channels, layers)
        self.preprocess1 = ConvNorm(in_channels[1], channels, layers)
        self.sources = [edge.source for edges in cell for edge in edges]
        self.operations = torch.nn.ModuleList(
            OPERATIONS[edge.operation](channels, stride if edge.source < 2 else 1, layers)
            for edges in cell
            for edge in edges
        )

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        nodes = [self.preprocess0(x0), self.preprocess1(x1)]
        edges = list(zip(self.operations, self.sources, strict=True))
        for (first, a), (second, b) in zip(edges[::2], edges[1::2], strict=True):
            nodes.append(first(nodes[a]) + second(nodes[b]))
        return torch.cat(nodes[2:], 1)


@register
class CellNetwork(torch.nn.Module):
    """A stack of cells: images ``[N, in_channels, H, W]`` to logits ``[N, num_classes]``.

    The cells at one and two thirds of the depth are reduction cells. The default is the network of DARTS for CIFAR-10,
    without its auxiliary head.

    Args:
        genotype: the two cells, or the text that :meth:`Genotype.parse` reads.
        channels: of an operation in the first cells.
        num_cells: depth, at least 3.
        in_channels: channels of the images.
        num_classes: classes to tell apart.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``num_cells`` is below 3, or ``genotype`` is no genotype.
    """

    def __init__(
        self,
        genotype: Genotype | str = DARTS,
        channels: int = 36,
        num_cells: int = 20,
        in_channels: int = 3,
        num_classes: int = 10,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        if num_cells < 3:
            raise ValueError(f"num_cells must be at least 3, got {num_cells}")
        if isinstance(genotype, str):
            genotype = Genotype.parse(genotype)
        widths = (3 * channels, 3 * channels)  # of the outputs of the last two cells
        self.stem = torch.nn.Sequential(
            layers.Conv2d(in_channels, widths[0], 3, padding=1, bias=False), layers.BatchNorm2d(widths[0])
        )
        self.cells = torch.nn.ModuleList()
        follows_reduction = False
        for index in range(num_cells):
            is_reduction = index in (num_cells // 3, 2 * num_cells // 3)
            cell = genotype.reduction if is_reduction else genotype.normal
            channels *= 2 if is_reduction else 1
            stride = 2 if is_reduction else 1
            self.cells.append(CellBlock(cell, widths, channels, stride, follows_reduction, layers))
            widths = (widths[1], len(cell) * channels)
            follows_reduction = is_reduction
        self.pool = torch.nn.AdaptiveAvgPool2d(1)
        self.classifier = layers.Linear(widths[1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        before = last = self.stem(x)  # [N, 3 * channels, H, W]
        for cell in self.cells:
            before, last = last, cell(before, last)
        return self.classifier(self.pool(last).flatten(1))  # [N, num_classes]


# ---- Search ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A genotype that was evaluated."""

    genotype: Genotype
    score: float


@dataclass(frozen=True)
class SearchResult:
    """The candidate with the highest score, and all of them in the order of their evaluation."""

    best: Candidate
    history: tuple[Candidate, ...]


def random_genotype(nodes: int, generator: random.Random) -> Genotype:
    """Cells of ``nodes`` sums, with every operation and every earlier node equally likely."""

    def edge(node: int) -> Edge:
        return Edge(generator.choice(list(OPERATIONS)), generator.randrange(node))

    normal, reduction = (tuple((edge(node), edge(node)) for node in range(2, 2 + nodes)) for _ in range(2))
    return Genotype(normal, reduction)


def mutate(genotype: Genotype, generator: random.Random) -> Genotype:
    """Changes one edge of one cell: its operation or its source, to another one."""
    name = generator.choice(["normal", "reduction"])
    edges = [list(pair) for pair in getattr(genotype, name)]
    node, side = generator.randrange(len(edges)), generator.randrange(2)
    edge = edges[node][side]
    if generator.random() < 0.5:
        changed = replace(edge, operation=generator.choice([key for key in OPERATIONS if key != edge.operation]))
    else:
        changed = replace(edge, source=generator.choice([i for i in range(node + 2) if i != edge.source]))
    edges[node][side] = changed
    return replace(genotype, **{name: tuple((first, second) for first, second in edges)})


def search(
    evaluate: Callable[[Genotype], float],
    *,
    candidates: int,
    population: int,
    tournament: int,
    nodes: int = 4,
    seed: int = 0,
) -> SearchResult:
    """Regularised evolution: good candidates have children, and the oldest dies, however good.

    The first ``population`` candidates are random; where that is all of them, this is a random search. Each later one
    is a mutation of the best of ``tournament`` members drawn from the population, and replaces its oldest member.

    Args:
        evaluate: the score of a genotype, higher is better: accuracy on validation data after a short training.
        candidates: how many are evaluated in all.
        population: how many are alive.
        tournament: how many of these compete to be the parent.
        nodes: sums in a cell.
        seed: decides every choice.

    Raises:
        ValueError: not 1 <= tournament <= population <= candidates; a score is not a number.
    """
    if not 1 <= tournament <= population <= candidates:
        raise ValueError(
            "search needs 1 <= tournament <= population <= candidates, "
            f"got tournament {tournament}, population {population}, candidates {candidates}"
        )
    generator = random.Random(seed)
    alive: deque[Candidate] = deque(maxlen=population)  # appending to a full one drops its oldest
    history: list[Candidate] = []
    while len(history) < candidates:
        if len(alive) < population:
            genotype = random_genotype(nodes, generator)
        else:
            parent = max(generator.sample(list(alive), tournament), key=lambda candidate: candidate.score)
            genotype = mutate(parent.genotype, generator)
        candidate = Candidate(genotype, evaluate(genotype))
        if math.isnan(candidate.score):
            raise ValueError(f"evaluate returned {candidate.score} for {genotype}")
        alive.append(candidate)
        history.append(candidate)
    return SearchResult(max(history, key=lambda candidate: candidate.score), tuple(history))
